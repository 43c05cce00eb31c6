// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011), and the streams drawn from it.
//
// Nothing here has state that outlives a sample: a draw is a function of (seed, epoch, sample, purpose, draw number),
// so the same sample gets the same numbers in any batch, on any rank and in any thread.
#pragma once

#include <array>
#include <cstdint>

namespace beit_fast {

using PhiloxBlock = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

inline PhiloxBlock philox4x32_10(PhiloxBlock counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(product0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Keeps the draws for one purpose apart from those for another. The numbers are part of the format of a run: changing
// one changes the data of every run that is resumed.
enum class Purpose : std::uint32_t { mask = 1, window = 2, colour = 3, order = 4, key = 5, growth = 6 };

class SampleStream {
 public:
  SampleStream(std::uint64_t seed, std::uint32_t epoch, std::uint64_t sample, Purpose purpose)
      : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)},
        counter_{static_cast<std::uint32_t>(purpose) << 28, epoch, static_cast<std::uint32_t>(sample),
                 static_cast<std::uint32_t>(sample >> 32)} {}

  // Four fresh words; at most 2^28 calls.
  PhiloxBlock next() {
    const PhiloxBlock block = philox4x32_10(counter_, key_);
    ++counter_[0];
    return block;
  }

 private:
  PhiloxKey key_;
  PhiloxBlock counter_;
};

// Uniform in [0, 1), 32 bits of it.
inline double unit(std::uint32_t word) { return word * 0x1p-32; }

inline double uniform(double low, double high, std::uint32_t word) { return low + (high - low) * unit(word); }

// Uniform in {0, ..., bound - 1}; uneven by less than bound / 2^32.
inline std::uint32_t below(std::uint32_t bound, std::uint32_t word) {
  return static_cast<std::uint32_t>((std::uint64_t{bound} * word) >> 32);
}

}  // namespace beit_fast
