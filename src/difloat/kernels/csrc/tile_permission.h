// Linux lets a process use the tiles of AMX only after it has asked for them.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace difloat {

// Whether the kernel lets this process use tiles: asked once, and answered for all its threads. A kernel that knows none refuses.
static inline bool tiles_permitted() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return permitted;
#else
    return false;
#endif
}

}  // namespace difloat
