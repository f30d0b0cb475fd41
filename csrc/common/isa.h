// Which instruction sets this build and this processor have.
#pragma once

namespace musubi {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };
constexpr int kIsaCount = 4;

const char* name_of(Isa isa);

// True when the running processor (and its operating system) can run code of `isa`.
bool has(Isa isa);

}  // namespace musubi
