// Threads of OpenMP: torch brings the same libgomp, so that its threads are the ones that run here.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace beit_fast {

#ifdef _OPENMP
constexpr bool kHasThreads = true;
#else
constexpr bool kHasThreads = false;
#endif

// Calls work(first, last) for parts of [0, count), one part a thread.
template <typename Work>
void in_parallel(std::int64_t count, std::int64_t threads, const Work& work) {
  threads = std::max<std::int64_t>(1, std::min(threads, count));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const std::int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
      work(count * thread / all, count * (thread + 1) / all);
    }
    return;
  }
#endif
  work(0, count);
}

}  // namespace beit_fast
