// beit_fast._C: checks what Python hands over, allocates what it gets back, and releases the GIL in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "blockwise_mask.h"
#include "philox.h"
#include "view_sampler.h"
#include "color_jitter.h"
#include "kernel_bindings.h"

namespace py = pybind11;
using namespace beit_fast;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

[[noreturn]] void refuse(const std::string& name, const std::string& rest) {
  throw std::invalid_argument(name + " " + rest);
}

std::string text(py::handle value) { return py::cast<std::string>(py::repr(value)); }

template <typename T>
T* pointer(const py::array& array) {
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// Any integer Python has a name for (int, numpy.int64, ...), within [0, most].
std::uint64_t as_unsigned(const py::object& value, const std::string& name, std::uint64_t most) {
  PyObject* number = PyNumber_Index(value.ptr());
  const std::uint64_t result = number ? PyLong_AsUnsignedLongLong(number) : 0;
  const bool failed = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  Py_XDECREF(number);
  if (failed || result > most)
    refuse(name, "must be an integer between 0 and " + std::to_string(most) + ", got " + text(value));
  return result;
}

std::uint64_t as_seed(const py::object& value) {
  return as_unsigned(value, "seed", std::numeric_limits<std::uint64_t>::max());
}

std::uint32_t as_epoch(const py::object& value) {
  return static_cast<std::uint32_t>(as_unsigned(value, "epoch", std::numeric_limits<std::uint32_t>::max()));
}

std::int64_t as_int(const py::object& value, const std::string& name) {
  PyObject* number = PyNumber_Index(value.ptr());
  const long long result = number ? PyLong_AsLongLong(number) : 0;
  const bool failed = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  Py_XDECREF(number);
  if (failed) refuse(name, "must be an integer, got " + text(value));
  return result;
}

double as_real(const py::object& value, const std::string& name) {
  const double result = PyFloat_AsDouble(value.ptr());
  const bool failed = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  if (failed) refuse(name, "must be a number, got " + text(value));
  return result;
}

// A sequence of `count` finite numbers.
std::vector<double> as_reals(const py::object& value, const std::string& name, std::size_t count) {
  std::vector<double> result;
  if (py::isinstance<py::sequence>(value) || py::isinstance<py::array>(value)) {
    for (py::handle item : value) {
      const double number = PyFloat_AsDouble(item.ptr());
      if (PyErr_Occurred()) break;
      result.push_back(number);
    }
  }
  const bool failed = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  bool good = !failed && result.size() == count;
  for (double number : result) good = good && std::isfinite(number);
  if (!good) refuse(name, "must be " + std::to_string(count) + " finite numbers, got " + text(value));
  return result;
}

// A one-dimensional array (or list) of integers between `least` and `most`, `batch` of them unless negative.
Int64Array as_int64_vector(const py::object& value, const std::string& name, std::int64_t least, std::int64_t most,
                           std::int64_t batch = -1) {
  py::array array = py::array::ensure(value);
  PyErr_Clear();
  if (!array || array.ndim() != 1) refuse(name, "must be a one-dimensional array of integers");
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u' && array.size() > 0) refuse(name, "must be integers, got " + text(array.dtype()));
  if (batch >= 0 && array.size() != batch) {
    refuse(name,
           "must have " + std::to_string(batch) + " entries, one per sample, got " + std::to_string(array.size()));
  }
  if (kind == 'u' && array.itemsize() == 8) {  // the cast below would wrap
    const auto wide = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>(array);
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      if (wide.data()[i] > static_cast<std::uint64_t>(most)) refuse(name, "must be at most " + std::to_string(most));
    }
  }
  const auto result = Int64Array(py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>(array));
  for (py::ssize_t i = 0; i < result.size(); ++i) {
    const std::int64_t entry = result.data()[i];
    if (entry < least || entry > most) {
      refuse(name, "must be between " + std::to_string(least) + " and " + std::to_string(most) + ", got " +
                       std::to_string(entry) + " at position " + std::to_string(i));
    }
  }
  return result;
}

constexpr std::int64_t kMostIndex = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMostSide = std::numeric_limits<std::int32_t>::max();

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string result = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) result += ", ";
    result += shape[i] < 0 ? std::string("any") : std::to_string(shape[i]);
  }
  return result + ")";
}

std::string describe(const py::handle& value) {
  if (!py::isinstance<py::array>(value))
    return py::cast<std::string>(py::str(py::type::handle_of(value).attr("__name__")));
  const py::array array = py::reinterpret_borrow<py::array>(value);
  const bool contiguous = (array.flags() & py::array::c_style) != 0;
  std::vector<std::int64_t> shape(array.shape(), array.shape() + array.ndim());
  return text(array.dtype()) + " " + shape_text(shape) + (contiguous ? "" : ", not contiguous") +
         (array.writeable() ? "" : ", read-only");
}

// A C-contiguous numpy array of one of the `kinds` ("u1", "b1", "f4") and of this shape (-1: any size), used in place.
py::array as_array(const py::object& value, const std::string& name, const std::vector<std::string>& kinds,
                   const std::vector<std::int64_t>& shape, bool writeable = false) {
  bool good = py::isinstance<py::array>(value);
  if (good) {
    const py::array array = py::reinterpret_borrow<py::array>(value);
    bool known = false;
    for (const std::string& kind : kinds)
      known = known || array.dtype().is(py::dtype(kind)) || array.dtype().equal(py::dtype(kind));
    good = known && (array.flags() & py::array::c_style) != 0 &&
           array.ndim() == static_cast<py::ssize_t>(shape.size()) && (!writeable || array.writeable());
    for (std::size_t i = 0; good && i < shape.size(); ++i)
      good = shape[i] < 0 || array.shape(static_cast<py::ssize_t>(i)) == shape[i];
  }
  if (!good) {
    std::string expected;
    for (const std::string& kind : kinds) expected += (expected.empty() ? "" : " or ") + text(py::dtype(kind).attr("name"));
    refuse(name, "must be a C-contiguous" + std::string(writeable ? ", writeable" : "") + " numpy array of " + expected +
                     ", shape " + shape_text(shape) + "; got " + describe(value));
  }
  return py::reinterpret_borrow<py::array>(value);
}

MaskMode as_mode(const py::object& value) {
  const std::string mode = py::isinstance<py::str>(value) ? py::cast<std::string>(value) : "";
  if (mode == "exact") return MaskMode::exact;
  if (mode == "official") return MaskMode::official;
  if (mode == "random") return MaskMode::random;
  if (mode == "none") return MaskMode::none;
  refuse("mode", "must be 'exact', 'official', 'random' or 'none', got " + text(value));
}

py::array py_sample_masks(const py::object& out, const py::object& indices, const py::object& seed,
                          const py::object& epoch, const py::object& num_masked, const py::object& min_num_patches,
                          const py::object& max_num_patches, const py::object& min_aspect, const py::object& max_aspect,
                          const py::object& mode) {
  const py::array masks = as_array(out, "out", {"uint8", "bool"}, {-1, -1, -1}, true);
  const std::int64_t batch = masks.shape(0);
  const Int64Array samples = as_int64_vector(indices, "indices", 0, kMostIndex, batch);
  const std::uint64_t seed_value = as_seed(seed);
  const std::uint32_t epoch_value = as_epoch(epoch);
  MaskParameters parameters{};
  parameters.height = masks.shape(1);
  parameters.width = masks.shape(2);
  parameters.num_masked = as_int(num_masked, "num_masked");
  parameters.min_num_patches = as_int(min_num_patches, "min_num_patches");
  parameters.max_num_patches =
      max_num_patches.is_none() ? parameters.num_masked : as_int(max_num_patches, "max_num_patches");
  parameters.min_aspect = as_real(min_aspect, "min_aspect");
  parameters.max_aspect = max_aspect.is_none() ? 1 / parameters.min_aspect : as_real(max_aspect, "max_aspect");
  parameters.mode = as_mode(mode);
  check(parameters);
  py::array_t<std::int32_t> counts(batch);
  {
    py::gil_scoped_release release;
    sample_masks(parameters, seed_value, epoch_value, pointer<std::int64_t>(samples), batch,
                 pointer<std::uint8_t>(masks), pointer<std::int32_t>(counts));
  }
  return counts;
}

py::tuple py_sample_views(const py::object& heights, const py::object& widths, const py::object& indices,
                          const py::object& seed, const py::object& epoch, const py::object& scale,
                          const py::object& ratio, const py::object& flip_probability, const py::object& brightness,
                          const py::object& contrast, const py::object& saturation) {
  const Int64Array samples = as_int64_vector(indices, "indices", 0, kMostIndex);
  const std::int64_t batch = samples.size();
  const Int64Array rows = as_int64_vector(heights, "heights", 1, kMostSide, batch);
  const Int64Array columns = as_int64_vector(widths, "widths", 1, kMostSide, batch);
  const std::uint64_t seed_value = as_seed(seed);
  const std::uint32_t epoch_value = as_epoch(epoch);
  const std::vector<double> scales = as_reals(scale, "scale", 2), ratios = as_reals(ratio, "ratio", 2);
  const ViewParameters parameters{scales[0],
                                  scales[1],
                                  ratios[0],
                                  ratios[1],
                                  as_real(flip_probability, "flip_probability"),
                                  as_real(brightness, "brightness"),
                                  as_real(contrast, "contrast"),
                                  as_real(saturation, "saturation")};
  check(parameters);
  py::array_t<std::int32_t> windows({batch, std::int64_t{4}});
  py::array_t<bool> flips(batch);
  py::array_t<float> factors({batch, std::int64_t{3}});
  {
    py::gil_scoped_release release;
    sample_views(parameters, seed_value, epoch_value, pointer<std::int64_t>(rows), pointer<std::int64_t>(columns),
                 pointer<std::int64_t>(samples), batch, pointer<std::int32_t>(windows), pointer<std::uint8_t>(flips),
                 pointer<float>(factors));
  }
  return py::make_tuple(windows, flips, factors);
}

py::array py_permute(const py::object& positions, const py::object& length, const py::object& seed,
                     const py::object& epoch) {
  const std::int64_t n = as_int(length, "length");
  if (n < 1) refuse("length", "must be at least 1, got " + std::to_string(n));
  const Int64Array places = as_int64_vector(positions, "positions", 0, n - 1);
  const std::uint64_t seed_value = as_seed(seed);
  const std::uint32_t epoch_value = as_epoch(epoch);
  Int64Array order(places.size());
  {
    py::gil_scoped_release release;
    permute(seed_value, epoch_value, n, pointer<std::int64_t>(places), places.size(), pointer<std::int64_t>(order));
  }
  return order;
}

py::array py_sample_keys(const py::object& indices, const py::object& seed, const py::object& epoch) {
  const Int64Array samples = as_int64_vector(indices, "indices", 0, kMostIndex);
  Int64Array keys(samples.size());
  sample_keys(as_seed(seed), as_epoch(epoch), pointer<std::int64_t>(samples), samples.size(),
              pointer<std::int64_t>(keys));
  return keys;
}

void require_pixels(const py::array& crops) {
  if (crops.shape(1) < 1 || crops.shape(2) < 1)
    refuse("crops", "must have at least one pixel per image, got " + describe(crops));
}

void require_finite(const py::array& array, const std::string& name, bool negative_too) {
  const float* values = pointer<float>(array);
  for (py::ssize_t i = 0; i < array.size(); ++i) {
    if (!std::isfinite(values[i]) || (!negative_too && values[i] < 0)) {
      refuse(name, std::string("must be finite") + (negative_too ? "" : " and not negative") + ", got " +
                       std::to_string(values[i]));
    }
  }
}

py::array py_transform_views(const py::object& crops, const py::object& flips, const py::object& factors,
                             const py::object& centers, const py::object& mean, const py::object& std,
                             const py::object& out, const py::object& threads) {
  const py::array images = as_array(crops, "crops", {"uint8"}, {-1, -1, -1, 3});
  require_pixels(images);
  ViewTransform transform{};
  transform.batch = images.shape(0);
  transform.height = images.shape(1);
  transform.width = images.shape(2);
  const py::array flip = as_array(flips, "flips", {"bool", "uint8"}, {transform.batch});
  const py::array factor = as_array(factors, "factors", {"float32"}, {transform.batch, 3});
  require_finite(factor, "factors", false);
  if (!centers.is_none()) {
    const py::array center = as_array(centers, "centers", {"float32"}, {transform.batch});
    require_finite(center, "centers", false);
    transform.centers = pointer<float>(center);
  }
  const std::vector<double> means = as_reals(mean, "mean", 3), stds = as_reals(std, "std", 3);
  for (std::size_t channel = 0; channel < 3; ++channel) {
    if (stds[channel] <= 0) refuse("std", "must be positive, got " + text(std));
    transform.mean[channel] = means[channel];
    transform.std[channel] = stds[channel];
  }
  const std::int64_t thread_count = as_int(threads, "threads");
  if (thread_count < 1 || thread_count > 1024)
    refuse("threads", "must be between 1 and 1024, got " + std::to_string(thread_count));
  const std::vector<std::int64_t> shape{transform.batch, 3, transform.height, transform.width};
  const py::array result =
      out.is_none() ? py::array(py::array_t<float>(shape)) : as_array(out, "out", {"float32"}, shape, true);
  transform.crops = pointer<std::uint8_t>(images);
  transform.flips = pointer<std::uint8_t>(flip);
  transform.factors = pointer<float>(factor);
  transform.out = pointer<float>(result);
  {
    py::gil_scoped_release release;
    transform_views(transform, static_cast<int>(thread_count));
  }
  return result;
}

py::array py_gray_means(const py::object& crops) {
  const py::array images = as_array(crops, "crops", {"uint8"}, {-1, -1, -1, 3});
  require_pixels(images);
  py::array_t<float> means(images.shape(0));
  {
    py::gil_scoped_release release;
    gray_means(pointer<std::uint8_t>(images), images.shape(0), images.shape(1) * images.shape(2),
               pointer<float>(means));
  }
  return means;
}

py::tuple py_philox(const PhiloxBlock& counter, const PhiloxKey& key) {
  return py::cast(philox4x32_10(counter, key)).cast<py::tuple>();
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "Samplers and CPU view transform of beit_fast; every draw is a function of (seed, epoch, sample). See _C.pyi.";
  module.def("sample_masks", &py_sample_masks, py::arg("out"), py::arg("indices"), py::arg("seed"), py::arg("epoch"),
             py::arg("num_masked"), py::arg("min_num_patches") = 16, py::arg("max_num_patches") = py::none(),
             py::arg("min_aspect") = 0.3, py::arg("max_aspect") = py::none(), py::arg("mode") = "exact");
  module.def("sample_views", &py_sample_views, py::arg("heights"), py::arg("widths"), py::arg("indices"),
             py::arg("seed"), py::arg("epoch"), py::arg("scale") = py::make_tuple(0.08, 1.0),
             py::arg("ratio") = py::make_tuple(3.0 / 4, 4.0 / 3), py::arg("flip_probability") = 0.5,
             py::arg("brightness") = 0.4, py::arg("contrast") = 0.4, py::arg("saturation") = 0.4);
  module.def("permute", &py_permute, py::arg("positions"), py::arg("length"), py::arg("seed"), py::arg("epoch"));
  module.def("sample_keys", &py_sample_keys, py::arg("indices"), py::arg("seed"), py::arg("epoch"));
  module.def("transform_views", &py_transform_views, py::arg("crops"), py::arg("flips"), py::arg("factors"),
             py::arg("centers"), py::arg("mean"), py::arg("std"), py::arg("out") = py::none(), py::arg("threads") = 1);
  module.def("gray_means", &py_gray_means, py::arg("crops"));
  module.def("philox4x32_10", &py_philox, py::arg("counter"), py::arg("key"));
  bind_kernels(module);
}
