/* Elements to chunks: looks at the frequencies, prices the ways to write them, writes the cheapest. */
#include <stdlib.h>

#include "price.h"
#include "split.h"

enum { INT, BOOL, E8, E5, E11, F8 };
enum { FEW = 4096 };

typedef struct {
    int coder, level;
    u8 *out;
    size_t cap;
} sink;

static int64_t encode_body(const u8 *x, size_t count, int width, int kind, sink to);

/* ---- writing symbols */

static int64_t write_rans(const u8 *symbols, size_t count, choice *c, sink to) {
    rans_plan *plan = &c->plan;
    const size_t blocks = (count + BLOCK - 1) / BLOCK, lanes = (size_t)plan->lanes;
    const size_t padded = (count + lanes - 1) / lanes * lanes;
    u8 *space = malloc(3 * padded + blocks + 64);
    rans_coder *coders = NULL;
    int64_t n = NO_MEMORY;
    if (!space) return NO_MEMORY;
    u16 *words = (u16 *)space;
    u8 *entries = space + 2 * padded, *class = entries + padded;
    u32 states[MAX_LANES];
    if (map_and_group(c, symbols, count, to.level, entries, class)) goto end;
    /* What fills the last step is frequent in the last block: its table may lack what is frequent elsewhere. */
    const u32 *freq = plan->freq[plan->tables > 1 ? class[blocks - 1] : 0];
    int frequent = 0;
    for (int i = 1; i < plan->entries; i++)
        if (freq[i] > freq[frequent]) frequent = i;
    memset(entries + count, frequent, padded - count);
    coders = malloc((size_t)plan->tables * sizeof *coders);
    if (!coders) goto end;
    for (int t = 0; t < plan->tables; t++) rans_build(plan, t, NULL, coders + t);
    rans_code *code = rans_code_portable;
#if defined(SMELT_X86)
    if (to.level >= AVX512 && plan->lanes == LANES) code = rans_code_avx512;
#endif
    const size_t number = code(coders, plan, plan->tables > 1 ? class : NULL, entries, padded, words + padded, states);
    n = rans_write_head(plan, class, blocks, to.out, to.cap);
    if (n < 0) goto end;
    if (plan->escape >= 0) {
        u8 *p = to.out + n, *stop = to.out + to.cap;
        size_t last = 0;
        if (stop - p < 7) n = NO_ROOM;
        else p += put_varint(p, c->counts[plan->escape]);
        for (size_t i = 0; i < count && n >= 0; i++) {
            if (entries[i] != plan->escape) continue;
            if (stop - p < 8) n = NO_ROOM;
            else p += put_varint(p, i - last), *p++ = symbols[i], last = i;
        }
        if (n < 0) goto end;
        n = p - to.out;
    }
    if (to.cap - (size_t)n < 4 * lanes + 2 * number) n = NO_ROOM;
    else {
        u8 *p = to.out + n;
        for (size_t i = 0; i < lanes; i++, p += 4) put32(p, states[i]);
        for (size_t i = 0; i < number; i++, p += 2) put16(p, words[padded - number + i]);
        n = p - to.out;
    }
end:
    free(coders);
    free(space);
    return n;
}

/* A plane by whichever coder is allowed and cheapest. */
static int64_t write_symbols(const u8 *symbols, const u32 *counts, size_t count, choice *c, sink to) {
    const u64 huffman = to.coder == ONLY_RANS ? NONE : price_huffman(counts, count);
    const int both = to.coder == AUTO && count <= FEW && huffman != NONE;
    int64_t n = NO_ROOM;
    if (huffman != NONE && (to.coder == ONLY_HUFFMAN || both || huffman < c->price)) {
        n = huffman_encode(symbols, count, counts, to.out, to.cap);
        if (!both) return n;
        if (n > 0) to.cap = (size_t)n - 1; /* rANS only if it is smaller */
        if (n > 0) {
            u8 *trial = malloc(to.cap + 1);
            if (!trial) return NO_MEMORY;
            sink other = to;
            other.out = trial;
            const int64_t smaller = write_rans(symbols, count, c, other);
            if (smaller > 0) memcpy(to.out, trial, (size_t)smaller), n = smaller;
            free(trial);
            return n;
        }
    }
    return write_rans(symbols, count, c, to);
}

/* ---- cuts */

/* The cheapest cut with up to `most` more raw bits than symbols of 8 bits leave, for elements whose top 8 bits have
   `counts`.  best: its symbols; least: its price with the raw parts. */
static cut best_cut(const u32 *counts, size_t count, int width, int rotate, int most, int coder, choice *best,
                    u64 *least) {
    cut found = {width, 8 * width - 8, rotate};
    for (int r = 0; r <= most; r++) {
        u32 merged[256] = {0};
        choice c;
        for (int s = 0; s < 256; s++) merged[s >> r] += counts[s];
        price_plane(merged, count, &c);
        u64 symbols = coder == ONLY_HUFFMAN ? price_huffman(merged, count) : c.price;
        if (symbols == NONE) symbols = c.price; /* one symbol: no Huffman code, and rANS takes no bits */
        u64 price = symbols + (u64)(8 * width - 8 + r) * count * BIT;
        if (coder != ONLY_HUFFMAN && c.plan.buckets > 32) price += price / SLOWER;
        if (r == 0 || price + price / 4096 < *least) *least = price, *best = c, found.rest = 8 * width - 8 + r;
    }
    return found;
}

/* [SPLIT, cut, parts, symbols] or [BYTES, symbols]; NO_ROOM where that does not fit.

   x: the elements, or NULL where the parts are written already.  tops: the highest 8 bits of every element after the
   rotation, whose lowest bits are dropped here to make them symbols; counts: of the tops. */
static int64_t write_split(const u8 *x, size_t count, cut c, u8 *tops, const u32 *counts, choice *plan, sink to) {
    const size_t raw = parts_size(count, c.rest);
    const int dropped = c.rest + 8 - 8 * c.width;
    u32 merged[256] = {0};
    if (to.cap < raw + 8) return NO_ROOM;
    const int plain = c.width == 1 && !c.rest && !c.rotate;
    const size_t head = plain ? 1 : 2;
    to.out[0] = plain ? BYTES : SPLIT, to.out[1] = (u8)(c.rest | c.rotate << 6);
    if (c.rest && x) split_elements(to.level, c, x, count, NULL, to.out + 2);
    for (int s = 0; s < 256; s++) merged[s >> dropped] += counts[s];
    for (size_t i = 0; dropped && i < count; i++) tops[i] = (u8)(tops[i] >> dropped);
    const sink rest = {to.coder, to.level, to.out + head + raw, to.cap - head - raw};
    const int64_t n = write_symbols(tops, merged, count, plan, rest);
    return n < 0 ? n : n + (int64_t)(head + raw);
}

static int64_t encode_bytes(const u8 *x, size_t count, int kind, sink to) {
    u32 counts[256], rotated[256], nibbles[256] = {0};
    histogram(x, count, to.level, counts);
    if (kind == BOOL && counts[0] + counts[1] == count && to.cap > 1 && count > 1) {
        const size_t bytes = (count + 7) / 8;
        u8 *packed = calloc(bytes, 1);
        if (!packed) return NO_MEMORY;
        for (size_t i = 0; i < count; i++) packed[i / 8] |= (u8)(x[i] << (7 - i % 8));
        to.out[0] = BITS;
        int64_t n = encode_body(packed, bytes, 1, INT, (sink){to.coder, to.level, to.out + 1, to.cap - 1});
        free(packed);
        return n < 0 ? n : n + 1;
    }
    const int rotate = kind == F8;
    for (int s = 0; s < 256; s++) rotated[rotate ? (s << 1 | s >> 7) & 255 : s] = counts[s];
    choice best, pairs;
    u64 least;
    cut c = best_cut(rotated, count, 1, rotate, 4, to.coder, &best, &least);
    for (int s = 0; s < 256; s++) nibbles[s & 15] += counts[s], nibbles[s >> 4] += counts[s];
    if (!rotate && 2 * count <= 1 << 21 && to.cap > 1) { /* two symbols a byte, where they know nothing of each other */
        price_plane(nibbles, 2 * count, &pairs);
        u64 price = to.coder == ONLY_HUFFMAN ? price_huffman(nibbles, 2 * count) : pairs.price;
        if (price != NONE && price + price / 1024 < least) {
            u8 *both = malloc(2 * count);
            if (!both) return NO_MEMORY;
            for (size_t i = 0; i < count; i++) both[2 * i] = x[i] & 15, both[2 * i + 1] = x[i] >> 4;
            to.out[0] = NIBBLES;
            sink rest = {to.coder, to.level, to.out + 1, to.cap - 1};
            int64_t n = write_split(both, 2 * count, (cut){1, 0, 0}, both, nibbles, &pairs, rest);
            free(both);
            return n < 0 ? n : n + 1;
        }
    }
    u8 *tops = malloc(count);
    if (!tops) return NO_MEMORY;
    if (rotate)
        for (size_t i = 0; i < count; i++) tops[i] = (u8)(x[i] << 1 | x[i] >> 7);
    else memcpy(tops, x, count);
    const int64_t n = write_split(x, count, c, tops, rotated, &best, to);
    free(tops);
    return n;
}

/* ---- wide elements */

static int64_t encode_planes(const u8 *x, size_t count, int width, sink to) {
    u8 *space = malloc(2 * count + 16);
    if (!space) return NO_MEMORY;
    int64_t n = to.cap ? 1 : NO_ROOM;
    if (n > 0) to.out[0] = PLANES;
    for (int p = 0; p < width && n > 0; p++) {
        for (size_t i = 0; i < count; i++) space[i] = x[i * (size_t)width + (size_t)p];
        u8 *body = space + count;
        const int64_t size = encode_body(space, count, 1, INT, (sink){to.coder, to.level, body, count + 16});
        if (size < 0) n = size;
        else if (to.cap - (size_t)n < (size_t)size + 7) n = NO_ROOM;
        else {
            if (p < width - 1) n += (int64_t)put_varint(to.out + n, (u64)size);
            memcpy(to.out + n, body, (size_t)size), n += size;
        }
    }
    free(space);
    return n;
}

static int64_t encode_narrowed(const u8 *x, size_t count, int width, int how, int kind, sink to) {
    u8 *halves = malloc(count * (size_t)width / 2);
    if (!halves) return NO_MEMORY;
    int64_t n = NO_ROOM;
    if (how == HALF)
        for (size_t i = 0; i < count; i++) {
            u16 h;
            half_exactly(get32(x + 4 * i), &h);
            put16(halves + 2 * i, h);
        }
    else narrow(x, count, width, how == UPPER, halves);
    if (to.cap) {
        to.out[0] = (u8)how;
        n = encode_body(halves, count, width / 2, kind, (sink){to.coder, to.level, to.out + 1, to.cap - 1});
    }
    free(halves);
    return n < 0 ? n : n + 1;
}

static u64 element(const u8 *x, int width) {
    u64 v = 0;
    for (int i = width - 1; i >= 0; i--) v = v << 8 | x[i];
    return v;
}

/* Integers: minus the smallest where that saves bytes, then by halves as long as the upper ones are 0. */
static int64_t encode_integers(const u8 *x, size_t count, int width, sink to) {
    const u64 sign = (u64)1 << (8 * width - 1), half = (u64)1 << 4 * width, mask = sign | (sign - 1);
    u64 most = 0, low = mask, high = 0; /* low, high: as signed numbers, moved up to be unsigned */
    for (size_t i = 0; i < count; i++) {
        const u64 v = element(x + i * (size_t)width, width), moved = v ^ sign;
        most = v > most ? v : most, low = moved < low ? moved : low, high = moved > high ? moved : high;
    }
    if (most < half) return encode_narrowed(x, count, width, LOWER, INT, to);
    if (high - low < half && to.cap > (size_t)width + 1) {
        const u64 offset = low ^ sign;
        u8 *moved = malloc(count * (size_t)width);
        if (!moved) return NO_MEMORY;
        for (size_t i = 0; i < count; i++) {
            const u64 v = element(x + i * (size_t)width, width) - offset;
            for (int b = 0; b < width; b++) moved[i * (size_t)width + (size_t)b] = (u8)(v >> 8 * b);
        }
        to.out[0] = OFFSET;
        for (int b = 0; b < width; b++) to.out[1 + b] = (u8)(offset >> 8 * b);
        sink rest = {to.coder, to.level, to.out + 1 + width, to.cap - 1 - (size_t)width};
        int64_t n = encode_narrowed(moved, count, width, LOWER, INT, rest);
        free(moved);
        return n < 0 ? n : n + 1 + width;
    }
    return encode_planes(x, count, width, to);
}

/* Whether the low bytes of floating numbers seem to have less than 15/16 of the entropy they could have: few different
   values, for example.  Looks at 4096 elements at most; of a few hundred it is often wrong. */
static int few_values(const u8 *x, size_t count, int width) {
    const size_t step = count / 4096 + 1;
    u32 counts[256] = {0}, number = 0;
    u64 bits = 0;
    for (size_t i = 0; i < count; i += step, number++) counts[x[i * (size_t)width]]++;
    for (int s = 0; s < 256; s++)
        if (counts[s]) bits += counts[s] * (u64)(log2_fixed(number) - log2_fixed(counts[s]));
    return bits < number * (15 * BIT / 2);
}

static int64_t encode_cut(const u8 *x, size_t count, int width, int kind, sink to) {
    u32 counts[256];
    choice best;
    u64 least;
    u8 *tops = malloc(count);
    if (!tops) return NO_MEMORY;
    const cut usual = {width, 8 * width - 8, 1}; /* its parts are written at once */
    const int room = to.cap >= parts_size(count, usual.rest) + 8;
    split_elements(to.level, usual, x, count, tops, room ? to.out + 2 : NULL);
    histogram(tops, count, to.level, counts);
    const cut c = best_cut(counts, count, width, 1, kind == E5 ? 3 : 0, to.coder, &best, &least);
    const int64_t n = write_split(room && c.rest == usual.rest ? NULL : x, count, c, tops, counts, &best, to);
    free(tops);
    return n;
}

/* [NONZERO, mask, values]; NO_ROOM where the elements that are 0 are too few to pay. */
static int64_t encode_nonzero(const u8 *x, size_t count, int width, int kind, sink to) {
    const size_t step = count / 1024 + 1;
    size_t zeros = 0, number = 0;
    for (size_t i = 0; i < count; i += step, number++) zeros += !element(x + i * (size_t)width, width);
    if (16 * zeros < number || to.cap < 16) return NO_ROOM;
    u8 *mask = malloc(2 * count), *values = malloc((count + 1) * (size_t)width);
    int64_t n = mask && values ? NO_ROOM : NO_MEMORY;
    if (n == NO_ROOM) {
        const size_t kept = gather(x, count, width, mask, values);
        u8 *packed = mask + count; /* shorter than the mask, unless that is of a few bytes */
        const int64_t size = encode_body(mask, count, 1, BOOL, (sink){to.coder, to.level, packed, count});
        if (size > 0 && (u64)size + 8 < to.cap) {
            to.out[0] = NONZERO;
            n = 1 + (int64_t)put_varint(to.out + 1, (u64)size);
            memcpy(to.out + n, packed, (size_t)size), n += size;
            if (kept) {
                const sink rest = {to.coder, to.level, to.out + n, to.cap - (size_t)n};
                const int64_t more = encode_body(values, kept, width, kind, rest);
                n = more < 0 ? more : n + more;
            }
        } else if (size != NO_ROOM && size < 0) n = size;
    }
    free(mask);
    free(values);
    return n;
}

static int64_t encode_floats(const u8 *x, size_t count, int width, int kind, sink to) {
    if (width == 4) {
        int upper = 1, halves = 1;
        for (size_t i = 0; i < count && (upper || halves); i++) {
            const u32 v = get32(x + 4 * i);
            u16 h;
            upper = upper && !(v & 65535), halves = halves && half_exactly(v, &h);
        }
        if (halves && !(upper && !few_values(x + 2, count, 4))) return encode_narrowed(x, count, 4, HALF, E5, to);
        if (upper) return encode_narrowed(x, count, 4, UPPER, E8, to);
    }
    int64_t planes = encode_nonzero(x, count, width, kind, to);
    if (planes != NO_ROOM) return planes;
    const int few = few_values(x, count, width);
    if (kind == E11 || few) planes = encode_planes(x, count, width, to);
    if (kind == E11 || (few && count > FEW) || (planes < 0 && planes != NO_ROOM)) return planes;
    if (planes < 0) return encode_cut(x, count, width, kind, to);
    u8 *trial = malloc((size_t)planes); /* the cut only if it is smaller */
    if (!trial) return NO_MEMORY;
    const int64_t n = encode_cut(x, count, width, kind, (sink){to.coder, to.level, trial, (size_t)planes - 1});
    if (n > 0) memcpy(to.out, trial, (size_t)n);
    free(trial);
    return n > 0 ? n : n == NO_ROOM ? planes : n;
}
static int64_t encode_body(const u8 *x, size_t count, int width, int kind, sink to) {
    const size_t bytes = count * (size_t)width;
    int64_t n = NO_ROOM;
    if (bytes == (size_t)width || !memcmp(x, x + width, bytes - (size_t)width)) {
        if (to.cap < 1 + (size_t)width) return NO_ROOM;
        to.out[0] = CONSTANT;
        memcpy(to.out + 1, x, (size_t)width);
        return 1 + width;
    }
    sink less = to; /* what is not below the raw size is not wanted */
    if (less.cap > bytes) less.cap = bytes;
    if (width == 1) n = encode_bytes(x, count, kind, less);
    else if (kind == INT || kind == BOOL) n = encode_integers(x, count, width, less);
    else n = encode_floats(x, count, width, kind, less);
    if (n != NO_ROOM) return n;
    if (to.cap < 1 + bytes) return NO_ROOM;
    to.out[0] = RAW;
    memcpy(to.out + 1, x, bytes);
    return 1 + (int64_t)bytes;
}

/* The most that smelt_chunk_encode gives. */
SMELT_API int64_t smelt_chunk_bound(size_t count, int width) { return 1 + (int64_t)count * width; }

/* The body of a chunk: its bytes, or an error below 0.  kind and coder: see the enums above. */
SMELT_API int64_t smelt_chunk_encode(const void *elements, size_t count, int width, int kind, int coder, u8 *out,
                                     size_t cap) {
    if ((width != 1 && width != 2 && width != 4 && width != 8) || !count || count > 1 << 20) return WRONG_CALL;
    return encode_body(elements, count, width, kind, (sink){coder, best_level(), out, cap});
}
