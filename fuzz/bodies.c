#include "bodies.h"

#include <math.h>
#include <stdlib.h>

enum { ENCODED = 256 /* whatever the encoder takes */, DEEPEST = 8, WITHIN = 16 /* added inside of NONZERO */ };

typedef struct {
    u8 *at, *end; /* at is NULL where there was no room */
} sink;

static void put(sink *to, const void *data, size_t size) {
    if (!to->at || (size_t)(to->end - to->at) < size) to->at = NULL;
    else memcpy(to->at, data, size), to->at += size;
}

static void put_byte(sink *to, u32 byte) {
    const u8 b = (u8)byte;
    put(to, &b, 1);
}

static void put_number(sink *to, u64 number) {
    u8 bytes[10];
    put(to, bytes, put_varint(bytes, number));
}

/* ---- random numbers */

dice dice_of(const u8 *data, size_t size) {
    u64 state = 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < size; i++) state = (state ^ data[i]) * 0x100000001B3u;
    return (dice){data, size, state | 1};
}

u64 noise(dice *d) {
    d->state ^= d->state >> 12, d->state ^= d->state << 25, d->state ^= d->state >> 27;
    return d->state * 0x2545F4914F6CDD1Du;
}

u32 roll(dice *d, u32 sides) {
    if (sides < 2) return 0;
    if (!d->left) return (u32)((noise(d) >> 32) % sides);
    u32 value = *d->data++;
    d->left--;
    if (sides > 256 && d->left > 1) value = value << 16 | (u32)d->data[0] << 8 | d->data[1], d->data += 2, d->left -= 2;
    return value % sides;
}

static double uniform(dice *d) { return (double)(noise(d) >> 11) * 0x1p-53; }

static double normal(dice *d) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform(d);
    return sum;
}

/* ---- elements */

int kind_for(dice *d, int width) {
    static const u8 kinds[4][4] = {{0, 1, 5, 0}, {0, 2, 3, 0}, {0, 2, 0, 2}, {0, 4, 0, 4}};
    return kinds[log2_of((u32)width)][roll(d, 4)];
}

size_t some_count(dice *d) {
    static const u32 steps[] = {1, 8, 128, 1024, 8192, 4096, 1536, 16384};
    const u32 how = roll(d, 8);
    if (how < 2) return 1 + roll(d, 9);
    if (how < 4) return 1 + roll(d, 1500);
    if (how < 5) return 1 + roll(d, USUAL);
    const size_t count = (size_t)steps[roll(d, 8)] * (1 + roll(d, how < 7 ? 4 : 16)) + roll(d, 3);
    return count < 2 ? 1 : count > USUAL ? USUAL : count - 1;
}

static u64 bits_of(double x) {
    u64 v;
    memcpy(&v, &x, 8);
    return v;
}

static u64 floating(double x, int width, int how) {
    const float single = (float)x;
    u32 v;
    u16 half;
    memcpy(&v, &single, 4);
    if (width == 8) return bits_of(how & 1 ? x : (double)single);
    if (width == 4) return how & 1 ? v : how & 2 ? v & 0xFFFF0000 : (half_exactly(v & 0xFFFFE000, &half), single_of(half));
    return how & 1 ? (half_exactly(v & 0xFFFFE000, &half), half) : v >> 16;
}

void fill(dice *d, int width, size_t count, u8 *elements) {
    const u32 way = roll(d, 9), how = roll(d, 4), number = 1 + roll(d, 60), spread = 1 + roll(d, 16);
    u64 values[60];
    const u64 base = noise(d) >> roll(d, 64);
    for (u32 i = 0; i < number; i++) values[i] = how & 1 ? noise(d) : base + i;
    double scale = 1;
    for (size_t i = 0; i < count; i++) {
        u64 v = 0;
        if (i % 1024 == 0) scale = how & 2 ? exp2(-(double)(noise(d) >> 32) / 0x1p32 * spread) : exp2(-(double)spread);
        switch (way) {
        case 0: v = noise(d); break;
        case 1: v = values[(size_t)(pow(uniform(d), spread) * number)]; break;
        case 2: v = base + (u64)(int64_t)(normal(d) * scale * 1000); break;
        case 3: v = (u64)(int64_t)(normal(d) * scale * 300); break;
        case 4: v = uniform(d) < scale; break;
        case 5: v = base + i * number; break;
        case 6: v = (u64)(normal(d) > 0) * (noise(d) >> (64 - spread)); break;
        default: v = floating(normal(d) * scale, width, (int)how);
        }
        if (way == 8 && noise(d) >> 56 == 0) v = noise(d); /* what is rare becomes escapes */
        if (way > 6 && width == 1) v = (u64)(8 + (int)(normal(d) * 2)) << 3 | noise(d) >> 61;
        memcpy(elements + i * (size_t)width, &v, (size_t)width);
    }
}

/* ---- symbols by rANS */

/* Frequencies of `entries`, their sum 2^p, each below it. */
static void frequencies(dice *d, int entries, int p, u32 *freq) {
    const u32 whole = 1u << p, shape = roll(d, 4);
    u32 weights[256];
    u64 sum = 0;
    for (int i = 0; i < entries; i++) {
        const u32 w = (u32)(noise(d) >> 40) & 0xFFFF;
        weights[i] = shape == 0 ? w : shape == 1 ? w >> (i % 16) : shape == 2 ? (w & 1) * w : 1;
    }
    if (shape == 3) weights[roll(d, (u32)entries)] = 1 + roll(d, 1 << 16);
    for (int i = 0; i < entries; i++) sum += weights[i];
    u32 given = 0;
    for (int i = 0; i < entries; i++) freq[i] = sum ? (u32)((u64)weights[i] * whole / sum) : 0, given += freq[i];
    for (int i = 0; i < entries && given < whole; i++) {
        const u32 more = i == entries - 1 ? whole - given : (u32)((noise(d) >> 33) % (whole - given + 1));
        freq[i] += more, given += more;
    }
    for (int i = 0; i < entries; i++)
        if (freq[i] == whole) freq[i]--, freq[(i + 1) % entries]++;
}

static void make_rans(dice *d, int bits, size_t count, u8 *symbols, sink *to) {
    static const int sizes[] = {16, 32, 256};
    const size_t blocks = (count + BLOCK - 1) / BLOCK;
    rans_plan plan = {.buckets = sizes[roll(d, 3)], .precision = 8 + (int)roll(d, 7), .lanes = 1 << roll(d, 8)};
    if (roll(d, 2)) plan.lanes = LANES;
    const int escapes = roll(d, 4) == 0;
    plan.entries = 2 + (int)roll(d, (u32)plan.buckets - 1);
    plan.escape = escapes ? plan.entries - 1 : -1;
    plan.listed = plan.entries - escapes > 1 << bits || roll(d, 2);
    plan.tables = roll(d, 3) ? 1 : 1 + (int)roll(d, MAX_TABLES);
    const u32 first = plan.listed ? 0 : roll(d, (1u << bits) - (u32)(plan.entries - escapes) + 1);
    for (int i = 0; i < plan.entries - escapes; i++)
        plan.values[i] = plan.listed ? (u8)(noise(d) >> 32 & ((1u << bits) - 1)) : (u8)(first + (u32)i);
    for (int t = 0; t < plan.tables; t++) frequencies(d, plan.entries, plan.precision, plan.freq[t]);

    const size_t padded = (count + (size_t)plan.lanes - 1) / (size_t)plan.lanes * (size_t)plan.lanes;
    u8 *classes = malloc(blocks), *entries = malloc(padded);
    u16 *words = malloc(2 * padded), *end = words + padded;
    rans_coder *coders = malloc((size_t)plan.tables * sizeof *coders);
    u32 states[MAX_LANES];
    u64 number = 0;
    const u32 flat = roll(d, 4);
    for (size_t b = 0; b < blocks; b++) classes[b] = (u8)((noise(d) >> 32) % (u32)plan.tables);
    for (size_t i = 0; i < padded; i++) {
        const u32 *freq = plan.freq[plan.tables > 1 ? classes[i / BLOCK] : 0];
        u32 place = (u32)(noise(d) >> 40) & ((1u << plan.precision) - 1);
        int e = 0;
        if (flat)
            for (; place >= freq[e]; e++) place -= freq[e]; /* as often as the table says */
        else
            for (e = (int)(place % (u32)plan.entries); !freq[e];) e = (e + 1) % plan.entries;
        entries[i] = (u8)e;
        if (i >= count) continue;
        symbols[i] = e == plan.escape ? (u8)(noise(d) >> 32 & ((1u << bits) - 1)) : plan.values[e];
        number += e == plan.escape;
    }
    for (int t = 0; t < plan.tables; t++) rans_build(&plan, t, NULL, coders + t);
    const u8 *of_block = plan.tables > 1 ? classes : NULL;
    const size_t used = rans_code_portable(coders, &plan, of_block, entries, padded, end, states);
    int64_t n = to->at ? rans_write_head(&plan, classes, blocks, to->at, (size_t)(to->end - to->at)) : NO_ROOM;
    to->at = n < 0 ? NULL : to->at + n;
    if (escapes) put_number(to, number);
    for (size_t i = 0, last = 0; escapes && i < count; i++)
        if (entries[i] == plan.escape) put_number(to, i - last), put_byte(to, symbols[i]), last = i;
    for (int i = 0; i < plan.lanes; i++) put(to, &states[i], 4);
    put(to, end - used, 2 * used);
    free(classes), free(entries), free(words), free(coders);
}

/* ---- symbols by Huffman codes */

static void put_bit(u8 *out, size_t *at, u32 bit) {
    if (!(*at & 7)) out[*at >> 3] = 0;
    out[*at >> 3] |= (u8)(bit << (*at & 7)), ++*at;
}

static void make_huffman(dice *d, int bits, size_t count, u8 *symbols, sink *to) {
    const int all = 1 << bits, number = 2 + (int)roll(d, (u32)(roll(d, 2) && all > 8 ? 8 : all) - 1);
    const u32 deep = roll(d, 3);
    u8 lengths[256] = {0}, leaves[256] = {0}, of[256];
    for (int have = 1; have < number; have++) { /* a leaf becomes two */
        int at = deep == 0 ? have - 1 : deep == 1 ? 0 : (int)(noise(d) >> 32) % have;
        if (at < 0) at += have;
        for (int i = 0; i < have && leaves[at] == 12; i++) at = (at + 1) % have;
        for (int i = 0; deep == 1 && i < have; i++) at = leaves[i] < leaves[at] ? i : at;
        leaves[have] = ++leaves[at];
    }
    u8 every[256];
    for (int i = 0; i < all; i++) every[i] = (u8)i;
    for (int i = 0; i < number; i++) {
        const int j = i + (int)((noise(d) >> 33) % (u32)(all - i));
        of[i] = every[j], every[j] = every[i], lengths[of[i]] = leaves[i];
    }
    u32 next = 0, words[256] = {0};
    for (int length = 1; length <= 12; length++, next <<= 1)
        for (int s = 0; s < 256; s++)
            if (lengths[s] == length) words[s] = next++;

    const int log = (int)roll(d, 3), segments = log ? 2 << log : 1, listed = (int)roll(d, 2);
    int first = 0, last = all - 1;
    while (!lengths[first]) first++;
    while (!lengths[last]) last--;
    if (roll(d, 4) == 0) first = 0; /* more than need be said */
    u8 said[256];
    int n = 0;
    for (int s = first; s <= last; s++)
        if (!listed || lengths[s] || roll(d, 16) == 0) said[n++] = (u8)s;
    put_byte(to, (u32)(log | listed << 2));
    if (!listed) put_byte(to, (u32)first);
    put_byte(to, (u32)(n - 1));
    if (listed) put(to, said, (size_t)n);
    for (int i = 0; i < n; i += 2) put_byte(to, (u32)(lengths[said[i]] << 4 | (i + 1 < n ? lengths[said[i + 1]] : 0)));

    const size_t share = (count + (size_t)segments - 1) / (size_t)segments;
    const int likely = (int)roll(d, 4); /* or all symbols as often as each other */
    u8 *coded = malloc(count * 12 / 8 + 16 + (size_t)segments), *begin = coded, *ends[8];
    for (int k = 0; k < segments; k++) {
        size_t at = 0;
        for (size_t i = share * (size_t)k; i < share * ((size_t)k + 1) && i < count; i++) {
            u8 s = of[(noise(d) >> 33) % (u32)number];
            for (int t = 0; likely && t < 12 && (noise(d) >> 40 & 4095) >= 4096u >> lengths[s]; t++)
                s = of[(noise(d) >> 33) % (u32)number];
            symbols[i] = s;
            for (int b = lengths[s] - 1; b >= 0; b--) put_bit(begin, &at, words[s] >> b & 1);
        }
        ends[k] = begin + (at + 7) / 8;
        if (k < segments - 1) put_number(to, (u64)(ends[k] - begin));
        begin = ends[k];
    }
    put(to, coded, (size_t)(begin - coded));
    free(coded);
}

static void make_symbols(dice *d, int bits, size_t count, u8 *symbols, sink *to) {
    if (roll(d, 3)) make_rans(d, bits, count, symbols, to);
    else make_huffman(d, bits, count, symbols, to);
}

/* ---- bodies */

static u64 get(const u8 *x, int width) {
    u64 v = 0;
    memcpy(&v, x, (size_t)width);
    return v;
}

static void set(u8 *x, int width, u64 v) { memcpy(x, &v, (size_t)width); }

static void put_parts(sink *to, const u64 *rest, size_t count, int r) {
    int shift = 0;
    for (int c = 32; c; c /= 2) {
        if (!(r & c)) continue;
        const u64 mask = ((u64)1 << c) - 1;
        for (size_t i = 0; c >= 8 && i < count; i++) {
            const u64 v = rest[i] >> shift & mask;
            put(to, &v, (size_t)c / 8);
        }
        for (size_t i = 0; c < 8 && i < count; i += 128) {
            const size_t b = count - i < 128 ? count - i : 128, t = (b * (size_t)c + 7) / 8;
            u8 block[64] = {0};
            for (size_t j = 0; j < b; j++) block[j % t] |= (u8)((rest[i + j] >> shift & mask) << (c * (int)(j / t)));
            put(to, block, t);
        }
        shift += c;
    }
}

static void make_split(dice *d, int width, size_t count, u8 *x, sink *to) {
    const int bits = 1 + (int)roll(d, 8), r = 8 * width - bits, rotate = (int)roll(d, 2), size = 8 * width;
    u8 *symbols = malloc(count);
    u64 *rest = malloc(8 * count);
    for (size_t i = 0; i < count; i++) rest[i] = r ? noise(d) >> (64 - r) : 0;
    put_byte(to, SPLIT), put_byte(to, (u32)(r | rotate << 6));
    put_parts(to, rest, count, r);
    make_symbols(d, bits, count, symbols, to);
    for (size_t i = 0; i < count && to->at; i++) {
        const u64 v = (u64)symbols[i] << r | rest[i];
        set(x + i * (size_t)width, width, rotate ? v >> 1 | (v & 1) << (size - 1) : v);
    }
    free(symbols), free(rest);
}

/* `below`: bits that bytes may have at most. */
static void make(dice *d, int width, size_t count, int depth, int below, u8 *x, sink *to);

static void make_inner(dice *d, int kind, int width, size_t count, int depth, u8 *x, sink *to) {
    const int half = width / 2;
    const size_t inner = kind == BITS ? (count + 7) / 8 : kind == NIBBLES ? 2 * count : count;
    u8 *y = malloc(inner * 8 + 8);
    put_byte(to, (u32)kind);
    if (kind == OFFSET) {
        const u64 offset = noise(d) >> roll(d, 64);
        put(to, &offset, (size_t)width);
        make(d, width, count, depth + 1, 8, y, to);
        for (size_t i = 0; i < count && to->at; i++)
            set(x + i * (size_t)width, width, get(y + i * (size_t)width, width) + offset);
    } else if (kind == BITS) {
        make(d, 1, inner, depth + 1, 8, y, to);
        if (to->at && count & 7 && y[inner - 1] & (255 >> (count & 7))) to->at = NULL;
        for (size_t i = 0; i < count && to->at; i++) x[i] = y[i / 8] >> (7 - i % 8) & 1;
    } else if (kind == NIBBLES) {
        make(d, 1, inner, depth + 1, 4, y, to);
        for (size_t i = 0; i < count && to->at; i++) x[i] = (u8)(y[2 * i] | y[2 * i + 1] << 4);
    } else {
        make(d, half, count, depth + 1, 8, y, to);
        for (size_t i = 0; i < count && to->at; i++) {
            const u64 v = get(y + i * (size_t)half, half);
            set(x + i * (size_t)width, width, kind == HALF ? single_of((u16)v) : kind == UPPER ? v << 4 * width : v);
        }
    }
    free(y);
}

static void make_planes(dice *d, int width, size_t count, int depth, u8 *x, sink *to) {
    const size_t room = to->at ? (size_t)(to->end - to->at) : 0;
    u8 *space = malloc(count + room + 1);
    put_byte(to, PLANES);
    for (int p = 0; p < width; p++) {
        sink body = {to->at ? space + count : NULL, space + count + room};
        make(d, 1, count, depth + 1, 8, space, &body);
        if (!body.at) to->at = NULL;
        const size_t size = body.at ? (size_t)(body.at - (space + count)) : 0;
        if (p < width - 1) put_number(to, size);
        put(to, space + count, size);
        for (size_t i = 0; i < count && to->at; i++) x[i * (size_t)width + (size_t)p] = space[i];
    }
    free(space);
}

static void make_nonzero(dice *d, int width, size_t count, int depth, int below, u8 *x, sink *to) {
    const size_t room = to->at ? (size_t)(to->end - to->at) : 0;
    u8 *mask = malloc(count * 9 + room + 1), *y = mask + count, *space = y + 8 * count;
    size_t kept = 0;
    sink body = {space, space + room};
    make(d, 1, count, depth + 1 + WITHIN, 1, mask, &body);
    if (!body.at) to->at = NULL;
    put_byte(to, NONZERO);
    if (to->at) put_number(to, (u64)(body.at - space)), put(to, space, (size_t)(body.at - space));
    for (size_t i = 0; i < count && to->at; i++) kept += mask[i];
    if (kept) make(d, width, kept, depth + 1 + WITHIN, below, y, to);
    for (size_t i = 0; i < count && to->at; i++) {
        set(x + i * (size_t)width, width, mask[i] ? get(y, width) : 0);
        if (mask[i]) y += width;
    }
    free(mask);
}

static void make(dice *d, int width, size_t count, int depth, int below, u8 *x, sink *to) {
    static const u16 of_bytes[] = {BYTES, BYTES,   SPLIT, ENCODED, RAW,     CONSTANT,
                                   BITS,  NONZERO, BITS,  NIBBLES, OFFSET,  ENCODED};
    static const u16 of_words[] = {SPLIT,  SPLIT,   PLANES,  UPPER, LOWER,    HALF,
                                   OFFSET, ENCODED, ENCODED, RAW,   CONSTANT, NONZERO};
    int kind = width == 1 ? of_bytes[roll(d, below == 8 ? 12 : below == 1 ? 8 : 6)] : of_words[roll(d, 12)];
    const u8 *start = to->at;
    if (!to->at) return;
    if (kind == HALF && width != 4) kind = SPLIT;
    if (kind == NIBBLES && count > MOST_ELEMENTS) kind = BYTES;
    if (kind == SPLIT && below < 8) kind = BYTES;
    const int deep = depth % WITHIN > 1 || (depth >= WITHIN && width > 1);
    if (kind == ENCODED && (deep || count > MOST_ELEMENTS)) kind = width == 1 ? BYTES : SPLIT;
    if (kind == NONZERO && depth >= WITHIN) kind = width == 1 ? BYTES : SPLIT;
    if (depth % WITHIN == DEEPEST && kind >= PLANES && kind != BYTES) kind = CONSTANT;
    switch (kind) {
    case RAW:
        for (size_t i = 0; i < count * (size_t)width; i++) x[i] = (u8)(noise(d) >> 32 & ((1u << below) - 1));
        put_byte(to, RAW), put(to, x, count * (size_t)width);
        return;
    case CONSTANT: {
        const u64 v = noise(d) >> (below < 8 ? 64 - below : 0);
        for (size_t i = 0; i < count; i++) set(x + i * (size_t)width, width, v);
        put_byte(to, CONSTANT), put(to, &v, (size_t)width);
        return;
    }
    case SPLIT: make_split(d, width, count, x, to); return;
    case BYTES: put_byte(to, BYTES), make_symbols(d, below, count, x, to); return;
    case PLANES: make_planes(d, width, count, depth, x, to); return;
    case NONZERO: make_nonzero(d, width, count, depth, below, x, to); return;
    case ENCODED: {
        fill(d, width, count, x);
        for (size_t i = 0; below < 8 && i < count; i++) x[i] &= (u8)((1 << below) - 1);
        const int which = kind_for(d, width);
        const int64_t n = smelt_chunk_encode(x, count, width, which, (int)roll(d, 3), to->at, (size_t)(to->end - start));
        to->at = n > 0 ? to->at + n : NULL;
        return;
    }
    default: make_inner(d, kind, width, count, depth, x, to);
    }
}

size_t make_body(dice *d, int width, size_t count, u8 *elements, u8 *out, size_t cap) {
    sink to = {out, out + cap};
    make(d, width, count, 0, 8, elements, &to);
    return to.at ? (size_t)(to.at - out) : 0;
}

size_t wrap_body(dice *d, const u8 *body, size_t size, int *width, size_t *count, u8 *out, size_t cap) {
    static const u8 ways[] = {OFFSET, UPPER, LOWER, HALF, BITS, NIBBLES, PLANES, NONZERO};
    const int kind = ways[roll(d, 8)];
    sink to = {out, out + cap};
    put_byte(&to, (u32)kind);
    if (kind == OFFSET) {
        const u64 v = noise(d);
        put(&to, &v, (size_t)*width);
    } else if (kind == NONZERO) put(&to, "\2\1\1", 3); /* a mask of ones */
    else if (kind == BITS) *count = *count * 8 < USUAL ? *count * 8 : USUAL;
    else if (kind == NIBBLES) *count = (*count + 1) / 2;
    else if (kind == PLANES) *width = 2 << roll(d, 3);
    else if (*width < 8) *width *= 2;
    for (int p = 1; kind == PLANES && p < *width; p++) put_number(&to, size), put(&to, body, size);
    put(&to, body, size);
    return to.at ? (size_t)(to.at - out) : 0;
}

/* ---- inputs */

void write_head(u8 *out, int width, size_t count) {
    const u32 number = (u32)count - 1;
    out[0] = (u8)(log2_of((u32)width) | (count > USUAL ? LARGE << 2 : 0));
    out[1] = (u8)number, out[2] = (u8)(number >> 8), out[3] = (u8)(number >> 16);
}

void read_head(const u8 *in, int *width, size_t *count) {
    const u32 number = in[1] | (u32)in[2] << 8 | (u32)in[3] << 16;
    *width = 1 << (in[0] & 3);
    *count = 1 + number % (in[0] >> 2 == LARGE ? MOST_ELEMENTS : USUAL);
}
