/* What of tiles there is once in a process. */
#include "tile.h"

#include <stdlib.h>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

int has_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 ? 2 : 0;
}
#elif defined(__AVX2__) && defined(__FMA__)
int has_tiles(void) { return 1; }
#else
int has_tiles(void) { return 0; }
#endif

uint32_t *own_memory(int64_t words) {
    static _Thread_local uint32_t *memory;
    static _Thread_local int64_t size;
    if (size < words) {
        free(memory);
        size = filled(words, SIDE);
        memory = aligned_alloc(4 * SIDE, 4 * size);
    }
    return memory;
}
