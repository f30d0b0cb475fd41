// Which instruction sets this build and this processor have.
#pragma once

namespace musubi {

// avx512vbmi multiplies in float32, avx512bf16 in bf16 pairs; both decode by tables.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vbmi = 3, avx512bf16 = 4 };
constexpr int kIsaCount = 5;

const char* name_of(Isa isa);

// True when the running processor (and its operating system) can run code of `isa`.
bool has(Isa isa);

// Whether products of bf16 pairs are slower than float32 ones although the processor has them: on Intel's cores
// vdpbf16ps takes 2.2 cycles for what two multiply-adds do in one; on AMD's it takes half of their time.
bool prefers_floats();

}  // namespace musubi
