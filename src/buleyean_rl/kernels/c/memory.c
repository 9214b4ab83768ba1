/* Memory, and what `abi.py` checks when it loads the library. */
#include "kernels.h"

int64_t failed_allocations; /* so far */
static int64_t limit = INT64_MAX;

void limit_memory(int64_t bytes) { limit = bytes; }

void *allocate(int64_t bytes) {
    void *memory = bytes > limit ? NULL : aligned_alloc(64, (size_t)round_up(bytes ? bytes : 1, 64));
    if (memory) return memory;
#pragma omp atomic
    failed_allocations++;
    return NULL;
}

int scratch(const Buffer *buffers, int count) {
    static _Thread_local char *memory;
    static _Thread_local int64_t size;
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += round_up(buffers[i].bytes, 64);
    if (size < total || total > limit) {
        free(memory);
        memory = allocate(total);
        size = memory ? total : 0;
    }
    char *next = memory;
    for (int i = 0; i < count && memory; next += round_up(buffers[i++].bytes, 64)) *buffers[i].pointer = next;
    return memory != NULL;
}

const int64_t struct_sizes[] = {sizeof(GemmArgs), sizeof(AttentionArgs), sizeof(HeadSoftmaxArgs), sizeof(DecoderLayer),
                                sizeof(PackedSequence), sizeof(SavedActivations), sizeof(CachedLayer), sizeof(DecodeArgs), 0};

const char *instruction_set(void) { return INSTRUCTION_SET; }
