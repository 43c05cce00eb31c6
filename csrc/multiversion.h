// One build runs on any x86-64 and uses the instructions it finds there: BEIT_FAST_VERSIONS("avx2") before a function
// compiles it, and all it calls, a second time. Other compilers and machines get the function as it is. The results are
// the same predict_all: nothing is contracted or reordered.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define BEIT_FAST_VERSIONS(...) __attribute__((target_clones(__VA_ARGS__, "default"), flatten))
#define BEIT_FAST_HAS_VERSIONS true
#else
#define BEIT_FAST_VERSIONS(...)
#define BEIT_FAST_HAS_VERSIONS false
#endif
