// exp, log and rounding from IEEE additions, multiplications and divisions only. libm's own differ in the last bit
// between machines, and a bit is enough to move the edge of a sampled block.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace beit_fast {

// Half to even, as Python's round().
inline std::int64_t round_half_even(double x) { return std::lrint(x); }

// |x| <= 700; relative error below 1e-11.
inline double portable_exp(double x) {
  const std::int64_t n = round_half_even(x * 1.4426950408889634);
  const double r = (x - static_cast<double>(n) * 0x1.62e42fefa3800p-1) - static_cast<double>(n) * 0x1.ef35793c76730p-45;
  // The series of exp for |r| <= ln(2) / 2, to the ninth power: even and odd ones apart, so that they run side by side.
  constexpr double kEven[] = {1.0, 1.0 / 2, 1.0 / 24, 1.0 / 720, 1.0 / 40320};
  constexpr double kOdd[] = {1.0, 1.0 / 6, 1.0 / 120, 1.0 / 5040, 1.0 / 362880};
  const double r2 = r * r;
  double even = kEven[4], odd = kOdd[4];
  for (int k = 3; k >= 0; --k) {
    even = even * r2 + kEven[k];
    odd = odd * r2 + kOdd[k];
  }
  return (even + r * odd) * std::bit_cast<double>(static_cast<std::uint64_t>(n + 1023) << 52);
}

// x > 0 and normal; absolute error below 1e-15 for the ratios met here.
inline double portable_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2;
    --exponent;
  }
  const double s = (m - 1) / (m + 1), s2 = s * s;
  double sum = 0.0;  // log(m) = 2 artanh(s), |s| <= 0.1716
  for (int k = 25; k > 0; k -= 2) sum = 1.0 / k + s2 * sum;
  return exponent * 0x1.ef35793c76730p-45 + (2 * s * sum + exponent * 0x1.62e42fefa3800p-1);
}

}  // namespace beit_fast
