#pragma once

#include <pybind11/pybind11.h>

namespace beit_fast {

void bind_kernels(pybind11::module_& module);

}  // namespace beit_fast
