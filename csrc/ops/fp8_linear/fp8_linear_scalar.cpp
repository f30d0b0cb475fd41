// The scalar build of the product.
#define MUSUBI_ISA scalar
// clang-format off: the decoder is written over the vector
#include "common/vec_scalar.h"
#include "common/decode_vec.h"
// clang-format on

namespace musubi {
namespace MUSUBI_ISA {
// Registers: vectors of rows per tile, and outputs that go with 1, 2, 3 and 4 of them.
constexpr int kMaxVectors = 2;
constexpr int kFewOutputs = 4;  // rows of W that few rows of x meet at once
constexpr int kOutputs1 = 4;
constexpr int kOutputs2 = 4;
constexpr int kOutputs3 = 4;
constexpr int kOutputs4 = 4;
}  // namespace MUSUBI_ISA
}  // namespace musubi

#include "ops/fp8_linear/fp8_linear_few-inl.h"

namespace musubi {
namespace MUSUBI_ISA {

void linear(const LinearTask& task) { linear_in_floats(task); }

}  // namespace MUSUBI_ISA
}  // namespace musubi
