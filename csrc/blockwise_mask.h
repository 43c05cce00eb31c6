// BEiT's blockwise masking (paper, algorithm 1, as the official code runs it), for whole batches.
#pragma once

#include <cstdint>

namespace beit_fast {

enum class MaskMode {
  exact,     // official, then grown cell by cell to num_masked
  official,  // blocks until num_masked or until ten attempts fail: at most num_masked cells
  random,    // num_masked cells without replacement
  none,      // nothing masked
};

constexpr std::int64_t kMaxGrid = 64;  // a row is one 64-bit word

struct MaskParameters {
  std::int64_t height;  // grid, in patches
  std::int64_t width;
  std::int64_t num_masked;
  std::int64_t min_num_patches;  // area of a block, in patches
  std::int64_t max_num_patches;
  double min_aspect;  // rows over columns of a block
  double max_aspect;
  MaskMode mode;
};

// Throws std::invalid_argument naming the argument at fault.
void check(const MaskParameters& parameters);

// out: (batch, height, width) of 0 and 1; counts: (batch) masked cells. `parameters` has passed check().
void sample_masks(const MaskParameters& parameters, std::uint64_t seed, std::uint32_t epoch,
                  const std::int64_t* indices, std::int64_t batch, std::uint8_t* out, std::int32_t* counts);

}  // namespace beit_fast
