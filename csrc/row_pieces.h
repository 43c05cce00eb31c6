// Sums over the rows of a matrix are made of pieces of so many rows: one piece after the other in float, and the pieces
// by torch's pairwise sum. So their rounding does not grow with the rows, and does not depend on the threads.
#pragma once

#include <cstdint>

namespace beit_fast {

constexpr std::int64_t kRowsPerSum = 32;

inline std::int64_t pieces_of(std::int64_t rows) { return (rows + kRowsPerSum - 1) / kRowsPerSum; }

}  // namespace beit_fast
