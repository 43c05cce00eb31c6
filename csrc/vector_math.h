// exp and the normal distribution in float, as loops over them become vector instructions: no table, no branch.
// Not portable_math.h: a last bit may differ between machines, as it does in torch.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace beit_fast {

constexpr float kLeastExponent = -87.0f;  // below, exp is no normal float

// exp(x) for x <= 0, relative error below 3e-7; exp(-87), or 1.6e-38, for what is less. NaN stays NaN.
inline float exp_bounded(float x) {
  constexpr float kRound = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
  const float bounded = x < kLeastExponent ? kLeastExponent : x;
  const float shifted = bounded * 0x1.715476p0f + kRound;
  const float r = bounded - (shifted - kRound) * 0x1.62e43p-1f;
  // minimax polynomial of degree 5 for |r| <= ln(2) / 2, relative error 1.1e-7 and none at 0
  float p = 0.008312525227665901f;
  p = p * r + 0.041890162974596024f;
  p = p * r + 0.16667114198207855f;
  p = p * r + 0.499992311000824f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23) + (127u << 23));
}

// The same, and 0 for what is less than -87.
inline float exp_nonpositive(float x) {
  const float result = exp_bounded(x);
  return x < kLeastExponent ? 0.0f : result;
}

struct Gelu {
  float value, derivative;
};

// t * Phi(t) and its derivative Phi(t) + t * phi(t), Phi the normal distribution function and phi its density.
inline Gelu gelu(float t) {
  const float a = std::fabs(t);
  const float e = exp_bounded(-0.5f * t * t);
  // 1 - Phi(a) = exp(-a^2 / 2) * s * P(s) with s = 1 / (1 + 0.305 a): minimax polynomial, relative error 1.1e-7 and
  // none at 0
  const float s = 1.0f / (1.0f + 0.305f * a);
  float p = 0.036477845162153244f;
  p = p * s - 0.15210609138011932f;
  p = p * s + 0.18426528573036194f;
  p = p * s - 0.03670318052172661f;
  p = p * s + 0.12038041651248932f;
  p = p * s + 0.10360553115606308f;
  p = p * s + 0.12243872880935669f;
  p = p * s + 0.12164147198200226f;
  const float tail = e * (s * p);
  const float phi = t < 0.0f ? tail : 1.0f - tail;
  return {t * phi, phi + t * (0.3989422804014327f * e)};
}

}  // namespace beit_fast
