// The avx512vbmi build of the product: codes become floats by table look-up, and everything multiplies in float32.
#define MUSUBI_ISA avx512vbmi
// clang-format off: the decoder is written over the vector
#include "common/vec_avx512.h"
#include "common/decode_vbmi.h"
// clang-format on

namespace musubi {
namespace MUSUBI_ISA {
// Registers: vectors of rows per tile, and outputs that go with 1, 2, 3 and 4 of them.
constexpr int kMaxVectors = 4;
constexpr int kFewOutputs = 8;  // rows of W that few rows of x meet at once
constexpr int kOutputs1 = 24;
constexpr int kOutputs2 = 12;
constexpr int kOutputs3 = 8;
constexpr int kOutputs4 = 6;
}  // namespace MUSUBI_ISA
}  // namespace musubi

#include "ops/fp8_linear/fp8_linear_few-inl.h"

namespace musubi {
namespace MUSUBI_ISA {

void linear(const LinearTask& task) { linear_in_floats(task); }

}  // namespace MUSUBI_ISA
}  // namespace musubi
