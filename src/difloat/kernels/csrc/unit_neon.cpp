// The ARM unit: the shared code, compiled with the instructions that simd_neon.h names. Four products at a time take signed bytes.
#define DIFLOAT_SIGNED_WEIGHTS
#include "simd_neon.h"
// clang-format off: every header builds on the ones before it
#include "codes_neon.h"
#include "multiply_dot.h"
#include "exports.h"
