/* Decodes anything, at every level: none touches what it must not, and all say the same.  Memory may run out. */
#include <stdlib.h>

#include "bodies.h"
#include "memory.h"

size_t LLVMFuzzerMutate(u8 *data, size_t size, size_t most);
int LLVMFuzzerTestOneInput(const u8 *data, size_t size);
size_t LLVMFuzzerCustomMutator(u8 *data, size_t size, size_t most, unsigned seed);

static int decode(const u8 *body, size_t size, u8 *out, size_t count, int width, int level, size_t fails) {
    watch(fails);
    const int result = smelt_chunk_decode(body, size, out, count, width, level);
    /* Nibbles in nibbles double what they need, up to 2^21 bytes and half as many again each time. */
    check(most_in_use <= 3 * count * (size_t)width + (5 << 20), "too much memory");
    check(in_use == 0, "memory that was not given back");
    return result;
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size) {
    const int best = best_level() + (best_level() == AVX512); /* the last: PAST_CACHE */
    int width, first = 0;
    size_t count;
    if (size < HEAD) return -1;
    read_head(data, &width, &count);
    size_t needed = 0; /* allocations */
    const size_t bytes = count * (size_t)width;
    u8 *body = malloc(size - HEAD), *one = malloc(bytes), *space = malloc(bytes + 64 * (data[size - 1] & 1));
    u8 *other = space + (data[size - 1] & 1 ? (0 - (uintptr_t)space) % 64 : 0); /* on lines of the cache, or in exact room */
    memcpy(body, data + HEAD, size - HEAD);
    for (int level = 0; level <= best; level++) {
        u8 *out = level ? other : one;
        memset(out, level ? 0xA5 : 0x5A, bytes); /* what is not written differs */
        const int result = decode(body, size - HEAD, out, count, width, level, 0);
        needed = asked;
        check(result == OK || result == DAMAGED, "another result");
        if (level == 0) first = result;
        check(result == first, "levels give different results");
        if (level && result == OK) check(!memcmp(one, other, bytes), "levels give different elements");
        const u32 crc = smelt_crc32(0, body, size - HEAD);
        memset(other, 0x33, bytes);
        check(smelt_chunk_decode_checked(body, size - HEAD, other, count, width, level, crc) == result, "with a checksum");
        if (result == OK) check(!memcmp(one, other, bytes), "a checksum gives different elements");
        const int wrong = smelt_chunk_decode_checked(body, size - HEAD, other, count, width, level, crc ^ 1);
        check(wrong == DAMAGED, "a wrong checksum");
    }
    for (size_t fails = 1, number = size % 8 ? 0 : needed; fails <= number; fails++) {
        const int result = decode(body, size - HEAD, other, count, width, (int)(size / 8 % 3), fails);
        check(result == NO_MEMORY, "a result without memory");
    }
    free(body), free(one), free(space);
    return 0;
}

/* ---- changes that keep bodies valid, or nearly */

static size_t other_body(dice *d, u8 *data, size_t most) {
    const int width = 1 << roll(d, 4);
    const size_t count = some_count(d);
    u8 *elements = malloc(count * (size_t)width);
    const size_t size = make_body(d, width, count, elements, data + HEAD, most - HEAD);
    free(elements);
    if (size) write_head(data, width, count);
    return size ? size + HEAD : 0;
}

static size_t other_elements(dice *d, u8 *data, size_t size, size_t most) {
    int width;
    size_t count;
    read_head(data, &width, &count);
    const size_t bytes = count * (size_t)width;
    u8 *elements = malloc(bytes);
    int64_t n = 0;
    if (smelt_chunk_decode(data + HEAD, size - HEAD, elements, count, width, -1) == OK) {
        if (roll(d, 2)) {
            LLVMFuzzerMutate(elements, bytes, bytes);
            count = roll(d, 2) ? count : 1 + roll(d, (u32)count);
        }
        const int kind = kind_for(d, width), coder = (int)roll(d, 3);
        n = smelt_chunk_encode(elements, count, width, kind, coder, data + HEAD, most - HEAD);
        if (n > 0) write_head(data, width, count);
    }
    free(elements);
    return n > 0 ? (size_t)n + HEAD : 0;
}

static size_t wrapped(dice *d, u8 *data, size_t size, size_t most) {
    int width;
    size_t count;
    read_head(data, &width, &count);
    u8 *body = malloc(size);
    memcpy(body, data + HEAD, size - HEAD);
    const size_t n = wrap_body(d, body, size - HEAD, &width, &count, data + HEAD, most - HEAD);
    if (n) write_head(data, width, count);
    else memcpy(data + HEAD, body, size - HEAD);
    free(body);
    return n ? n + HEAD : 0;
}

static size_t other_count(dice *d, u8 *data, size_t size) {
    static const int steps[] = {-1, 1, -128, 128, -1024, 1024, -8, 8};
    int width;
    size_t count;
    read_head(data, &width, &count);
    if (roll(d, 4)) {
        const int64_t now = (int64_t)count + steps[roll(d, 8)];
        count = now < 1 ? 1 : now > MOST_ELEMENTS ? MOST_ELEMENTS : (size_t)now;
    } else count = some_count(d);
    write_head(data, width, count);
    return size;
}

size_t LLVMFuzzerCustomMutator(u8 *data, size_t size, size_t most, unsigned seed) {
    dice d = dice_of((const u8 *)&seed, sizeof seed);
    d.left = 0;
    size_t n = 0;
    if (most > HEAD + 16 && size > HEAD) {
        const u32 way = roll(&d, 32);
        if (way == 0) n = other_body(&d, data, most);
        else if (way < 4) n = other_elements(&d, data, size, most);
        else if (way == 4) n = wrapped(&d, data, size, most);
        else if (way == 5) n = other_count(&d, data, size);
        else if (way < 14) { /* only near the beginning, where the body says how it is written */
            const size_t head = size - HEAD < 24 ? size - HEAD : 24;
            n = LLVMFuzzerMutate(data + HEAD, head, head) ? size : 0;
        } else if (way < 20) n = HEAD + LLVMFuzzerMutate(data + HEAD, size - HEAD, most - HEAD);
    }
    return n ? n : LLVMFuzzerMutate(data, size, most);
}
