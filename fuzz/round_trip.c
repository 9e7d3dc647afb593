/* Elements come back: those that the encoder writes, at every level with the same bytes, and those of bodies that it
   never writes. */
#include "../src/smelt/native/encode.c" /* also what is static there */

#include "bodies.h"
#include "memory.h"

int LLVMFuzzerTestOneInput(const u8 *data, size_t size);

static u8 *copy(const u8 *data, size_t size) {
    u8 *to = malloc(size);
    memcpy(to, data, size);
    return to;
}

static void decodes(const u8 *body, size_t size, const u8 *elements, size_t count, int width) {
    const size_t bytes = count * (size_t)width;
    u8 *in = copy(body, size), *out = malloc(bytes);
    for (int level = 0; level <= best_level(); level++) {
        memset(out, 0xA5, bytes);
        check(smelt_chunk_decode(in, size, out, count, width, level) == OK, "a valid body is refused");
        check(!memcmp(out, elements, bytes), "other elements");
    }
    free(in), free(out);
}

static void encodes(const u8 *elements, size_t count, int width, int kind, int coder, u32 part) {
    const size_t bound = (size_t)smelt_chunk_bound(count, width), cap = bound * part / 256;
    u8 *one = malloc(bound), *other = malloc(bound);
    watch(0);
    const int64_t n = smelt_chunk_encode(elements, count, width, kind, coder, one, bound);
    const size_t number = part % 8 ? 0 : asked;
    check(in_use == 0, "memory that was not given back");
    check(n > 0 && (size_t)n <= bound, "more than the bound");
    for (int level = 0; level < best_level(); level++) {
        const int64_t m = encode_body(elements, count, width, kind, (sink){coder, level, other, bound});
        check(m == n && !memcmp(one, other, (size_t)n), "levels write different bytes");
    }
    decodes(one, (size_t)n, elements, count, width);
    u8 *less = malloc(cap);
    const int64_t m = smelt_chunk_encode(elements, count, width, kind, coder, less, cap);
    check(m == NO_ROOM || (m > 0 && (size_t)m <= cap), "more than there is room for");
    if (m > 0) decodes(less, (size_t)m, elements, count, width);
    for (size_t fails = 1; fails <= number; fails++) {
        watch(fails);
        const int64_t k = smelt_chunk_encode(elements, count, width, kind, coder, one, bound);
        check(k == NO_MEMORY || k > 0, "another result");
        check(in_use == 0, "memory that was not given back");
        if (k > 0) decodes(one, (size_t)k, elements, count, width); /* what was tried for want of a smaller one */
    }
    free(one), free(other), free(less);
}

/* Byte 0: bits 0-1 are log2 of the width; from bit 2 on: how elements come.  Byte 1: how much room besides the bound. */
int LLVMFuzzerTestOneInput(const u8 *data, size_t size) {
    if (size < 4) return -1;
    const int width = 1 << (data[0] & 3), how = data[0] >> 2 & 3;
    dice d = dice_of(data + 2, size - 2);
    size_t count = how ? some_count(&d) : (size - 2) / (size_t)width;
    if (count < 1 || count > USUAL) return -1;
    if (how == 2 && data[1] % 8 == 1) count = (1 << 17) + roll(&d, 7 << 17); /* several tables */
    u8 *elements = malloc(count * (size_t)width);
    if (how == 3) {
        u8 *body = malloc(1 << 16);
        const size_t n = make_body(&d, width, count, elements, body, 1 << 16);
        if (n) decodes(body, n, elements, count, width);
        free(body);
    } else {
        if (how) fill(&d, width, count, elements);
        else memcpy(elements, data + 2, count * (size_t)width);
        if (count > 256) encodes(elements, count, width, kind_for(&d, width), (int)roll(&d, 3), data[1]);
        else
            for (int coder = 0; coder < 3; coder++)
                for (int kind = 0; kind < 6; kind++)
                    if ((kind == E5) <= (width == 2) && (kind == E11) <= (width == 8) &&
                        (kind == BOOL || kind == F8) <= (width == 1) && (kind == E8) <= (width == 2 || width == 4))
                        encodes(elements, count, width, kind, coder, data[1]);
    }
    free(elements);
    return 0;
}
