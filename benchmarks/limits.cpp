// What one core of this machine can do at most: loops that multiply in registers and touch no memory.
//
//     g++ -O2 -march=native benchmarks/limits.cpp -o limits && ./limits
//
// Prints a line per instruction: its name, and billions of operations a second (a product and its sum are two). Only what the
// compiler's target has is there. kernels.py builds and runs it.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>

constexpr int ROUNDS = 1 << 16, SUMS = 12, TURNS = 25;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The fastest of several turns: others use the machine, too.
template <class Body>
static void rate(const char* name, double operations, Body body) {
    double best = 1e9;
    for (int turn = 0; turn < TURNS; turn++) {
        const double start = now();
        for (int i = 0; i < ROUNDS; i++) body();
        const double taken = now() - start;
        best = taken < best ? taken : best;
    }
    printf("%s %.1f\n", name, operations * ROUNDS / best / 1e9);
}

#define TWELVE(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)
#define FMA_512(n) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define DOT_512(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
#define BF16_512(n) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define FMA_256(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
#define DOT_256(n) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #n "\n"
// Two products of bytes in 16 bits, added there; multiply_pairs.h widens the sums after up to eight of these.
#define PAIRS_256(n) "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\nvpaddw %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
#define USED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm13"
#define RUN(OP) asm volatile(TWELVE(OP)::: USED)

int main() {
    // Registers hold whatever they hold; denormal numbers would slow products down.
    _mm256_zeroall();
#ifdef __AVX512F__
    asm volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\nvpxorq %%zmm31, %%zmm31, %%zmm31\n" ::: "memory");
    rate("fma-float32-512", SUMS * 32, [] { RUN(FMA_512); });
#endif
#ifdef __AVX512VNNI__
    rate("vpdpbusd-int8-512", SUMS * 128, [] { RUN(DOT_512); });
#endif
#ifdef __AVX512BF16__
    rate("vdpbf16ps-512", SUMS * 64, [] { RUN(BF16_512); });
#endif
    rate("fma-float32-256", SUMS * 16, [] { RUN(FMA_256); });
#ifdef __AVXVNNI__
    rate("vpdpbusd-int8-256", SUMS * 64, [] { RUN(DOT_256); });
#endif
    rate("vpmaddubsw-int8-256", SUMS * 64, [] { RUN(PAIRS_256); });
#ifdef __AMX_INT8__
    constexpr int ALLOW = 0x1023, TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, ALLOW, TILE_DATA) == 0) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
        rate("amx-int8", 4 * 32768, [] {
            _tile_dpbusd(0, 4, 5);
            _tile_dpbusd(1, 4, 5);
            _tile_dpbusd(2, 4, 5);
            _tile_dpbusd(3, 4, 5);
        });
        rate("amx-bf16", 4 * 16384, [] {
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 5);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 5);
        });
        _tile_release();
    }
#endif
}
