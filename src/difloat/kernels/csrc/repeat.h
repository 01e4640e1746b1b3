// Loops that the compiler must unroll before it decides what lives in registers: arrays of vectors that are indexed by a variable
// go to memory, and GCC takes that decision before it unrolls ordinary loops.
#pragma once
#include <utility>

#include "compiler.h"

namespace difloat {

template <class Body, int... I>
static INLINE void repeat_indices(Body&& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

// body(0), body(1), ..., body(N - 1), each index a constant. Bodies are lambdas marked UNROLLED.
template <int N, class Body>
static INLINE void repeat(Body&& body) {
    repeat_indices(body, std::make_integer_sequence<int, N>{});
}

}  // namespace difloat
