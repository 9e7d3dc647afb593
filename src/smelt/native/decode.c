/* Chunks back to elements (docs/format.md, "The entropy stream").  Nothing in a chunk is believed: a length, a
   position or a state that cannot be gives DAMAGED, and nothing outside in[0..size) and out[0..count * width) is touched. */
#include <stdlib.h>

#include "rans.h"
#include "split.h"

enum { DEPTH = 8, BATCH = 8192, MOST = 1 << 20 /* elements of a chunk */ };
enum { WITHIN = 16 /* added to the depth inside of NONZERO */ };

static int decode_body(const u8 *in, size_t size, u8 *out, size_t count, int width, int level, int depth);

/* ---- symbols by rANS */

typedef struct {
    const u8 *at, *end; /* the list, checked before */
    u64 left;
    size_t position;
    u8 symbol;
} escapes;

static void next_escape(escapes *e) {
    u64 gap;
    if (!e->left) {
        e->position = SIZE_MAX;
        return;
    }
    e->left--;
    e->at += get_varint(e->at, (size_t)(e->end - e->at), &gap);
    e->position += (size_t)gap, e->symbol = *e->at++;
}

/* Checks the list of escapes; returns the bytes it takes, or DAMAGED. */
static int64_t read_escapes(const u8 *in, size_t size, size_t count, escapes *e) {
    u64 number, gap, position = 0;
    size_t n = get_varint(in, size, &number);
    if (!n || number > count) return DAMAGED;
    *e = (escapes){in + n, in + size, number, 0, 0};
    for (u64 i = 0; i < number; i++) {
        size_t used = get_varint(in + n, size - n, &gap);
        if (!used || n + used >= size || (i && !gap)) return DAMAGED;
        n += used + 1, position += gap;
        if (position >= count) return DAMAGED;
    }
    next_escape(e);
    return (int64_t)n;
}

/* Whether all symbols have at most `bits` bits. */
static int narrow_enough(const u8 *symbols, size_t count, int bits) {
    u8 any = 0;
    for (size_t i = 0; i < count && bits < 8; i++) any |= symbols[i];
    return any >> bits == 0;
}

static int run(const rans_table *table, rans_lanes *lanes, int number, size_t count, u8 *out, int level) {
    size_t done = 0;
    if (number == LANES && count >= LANES) {
#if defined(SMELT_X86)
        if (level >= AVX512) done = LANES * rans_run_avx512(table, lanes, count / LANES, out);
        else if (level == SIMD) done = LANES * rans_run_avx2(table, lanes, count / LANES, out);
#elif defined(SMELT_NEON)
        if (level >= SIMD) done = LANES * rans_run_neon(table, lanes, count / LANES, out);
#endif
    }
    (void)level;
    return done < count ? rans_run_portable(table, lanes, number, count - done, out + done) : OK;
}

typedef struct {
    rans_plan plan;
    rans_table table[MAX_TABLES];
    rans_lanes lanes;
    u8 symbols[BATCH];
} workspace;

static int decode_rans(const u8 *in, size_t size, const u8 *parts, cut c, u8 *out, size_t count, int level,
                       workspace *work, u8 *classes) {
    rans_plan *plan = &work->plan;
    rans_lanes *lanes = &work->lanes;
    const size_t blocks = (count + BLOCK - 1) / BLOCK;
    int64_t n = rans_read_head(plan, classes, blocks, in, size);
    if (n < 0) return DAMAGED;
    in += n, size -= (size_t)n;
    escapes e = {in, in, 0, SIZE_MAX, 0};
    if (plan->escape >= 0) {
        if ((n = read_escapes(in, size, count, &e)) < 0) return DAMAGED;
        in += n, size -= (size_t)n;
    }
    const int number = plan->lanes;
    if (size < 4 * (size_t)number || (size & 1)) return DAMAGED;
    for (int i = 0; i < number; i++, in += 4) {
        lanes->low[i] = get16(in), lanes->high[i] = get16(in + 2);
        if (!lanes->high[i]) return DAMAGED;
    }
    lanes->words = in, lanes->end = in + size - 4 * (size_t)number;
    for (int t = 0; t < plan->tables; t++) rans_build(plan, t, &work->table[t], NULL);

    const int straight = c.width == 1 && !c.rest && !c.rotate;
    int error = OK;
    for (size_t begin = 0; begin < count && !error;) {
        const rans_table *table = &work->table[plan->tables > 1 ? classes[begin / BLOCK] : 0];
        const size_t left = count - begin, most = plan->tables > 1 ? BLOCK - begin % BLOCK : BATCH;
        const size_t now = left < most ? left : most;
#if defined(SMELT_X86)
        if (c.width == 2 && c.rest == 8 && c.rotate && level >= AVX512 && number == LANES) {
            const size_t steps = (plan->tables > 1 ? now : left) / LANES;
            const size_t done = LANES * rans_run_bf16_avx512(table, lanes, steps, parts + begin, out + 2 * begin);
            for (; e.position < begin + done; next_escape(&e)) {
                u32 x = (u32)e.symbol << 8 | parts[e.position];
                put16(out + 2 * e.position, (u16)(x >> 1 | x << 15));
            }
            begin += done;
            if (done) continue;
        }
#endif
        u8 *symbols = straight ? out + begin : work->symbols;
        error = run(table, lanes, number, now, symbols, level);
        for (; e.position < begin + now; next_escape(&e)) symbols[e.position - begin] = e.symbol;
        if (!narrow_enough(symbols, now, 8 * c.width - c.rest)) return DAMAGED;
        if (!straight) join_elements(level, c, symbols, parts, count, begin, now, out + (size_t)c.width * begin);
        begin += now;
    }
    if (error || lanes->words != lanes->end) return DAMAGED;
    for (int i = 0; i < number; i++)
        if (lanes->high[i] != 1 || lanes->low[i]) return DAMAGED;
    return OK;
}

/* ---- kinds of bodies */

static int decode_symbols(const u8 *in, size_t size, const u8 *parts, cut c, u8 *out, size_t count, int level) {
    int error;
    if (!size) return DAMAGED;
    if (in[0] >> 4 == 1) {
        workspace *work = malloc(sizeof *work + count / BLOCK + 1);
        if (!work) return NO_MEMORY;
        error = decode_rans(in, size, parts, c, out, count, level, work, (u8 *)(work + 1));
        free(work);
        return error;
    }
    if (c.width == 1 && !c.rest && !c.rotate) return huffman_decode(in, size, out, count);
    u8 *plane = malloc(count);
    if (!plane) return NO_MEMORY;
    error = huffman_decode(in, size, plane, count);
    if (!error && !narrow_enough(plane, count, 8 * c.width - c.rest)) error = DAMAGED;
    if (!error) join_elements(level, c, plane, parts, count, 0, count, out);
    free(plane);
    return error;
}

static int decode_split(const u8 *in, size_t size, u8 *out, size_t count, int width, int level) {
    if (!size || in[0] & 128) return DAMAGED;
    const cut c = {width, in[0] & 63, in[0] >> 6};
    const int bits = 8 * width - c.rest;
    const size_t raw = 1 + parts_size(count, c.rest);
    if (bits < 1 || bits > 8 || size < raw) return DAMAGED;
    return decode_symbols(in + raw, size - raw, in + 1, c, out, count, level);
}

/* Bytes of `count` elements, plane by plane, to elements. */
static void interleave(const u8 *const *planes, size_t count, int width, u8 *out) {
    if (width == 2)
        for (size_t i = 0; i < count; i++) out[2 * i] = planes[0][i], out[2 * i + 1] = planes[1][i];
    else if (width == 4)
        for (size_t i = 0; i < count; i++)
            put32(out + 4 * i, planes[0][i] | (u32)planes[1][i] << 8 | (u32)planes[2][i] << 16 | (u32)planes[3][i] << 24);
    else
        for (size_t i = 0; i < count; i++)
            for (int p = 0; p < width; p++) out[(size_t)width * i + (size_t)p] = planes[p][i];
}

static int decode_planes(const u8 *in, size_t size, u8 *out, size_t count, int width, int level, int depth) {
    const u8 *planes[8];
    if (width == 1) return DAMAGED;
    u8 *space = malloc(count * (size_t)width);
    if (!space) return NO_MEMORY;
    int error = OK;
    for (int p = 0; p < width && !error; p++) {
        u64 length = size;
        if (p < width - 1) {
            size_t n = get_varint(in, size, &length);
            in += n, size -= n;
            if (!n) length = size + (u64)1;
        }
        if (length > size || !length) error = DAMAGED;
        else if (depth % WITHIN <= DEPTH && in[0] == RAW && length == 1 + count) planes[p] = in + 1;
        else {
            u8 *plane = space + (size_t)p * count;
            error = decode_body(in, (size_t)length, plane, count, 1, level, depth);
            planes[p] = plane;
        }
        if (!error) in += length, size -= (size_t)length;
    }
    if (!error) interleave(planes, count, width, out);
    free(space);
    return error;
}

static int decode_half(const u8 *in, size_t size, u8 *out, size_t count, int width, int kind, int level, int depth) {
    if (width == 1 || (kind == HALF && width != 4)) return DAMAGED;
    const size_t bytes = count * (size_t)width / 2;
    u8 *halves = malloc(bytes ? bytes : 1);
    if (!halves) return NO_MEMORY;
    int error = decode_body(in, size, halves, count, width / 2, level, depth);
    if (!error && kind == HALF)
        for (size_t i = 0; i < count; i++) put32(out + 4 * i, single_of(get16(halves + 2 * i)));
    else if (!error) widen(halves, count, width, kind == UPPER, out);
    free(halves);
    return error;
}

static void add(u8 *out, size_t count, int width, const u8 *offset) {
    u64 by = 0;
    memcpy(&by, offset, (size_t)width);
    for (size_t i = 0; i < count; i++) {
        u64 x = 0;
        memcpy(&x, out + i * (size_t)width, (size_t)width);
        x += by;
        memcpy(out + i * (size_t)width, &x, (size_t)width);
    }
}

static int decode_bits(const u8 *in, size_t size, u8 *out, size_t count, int level, int depth) {
    const size_t bytes = (count + 7) / 8;
    u8 *packed = malloc(bytes ? bytes : 1);
    if (!packed) return NO_MEMORY;
    int error = decode_body(in, size, packed, bytes, 1, level, depth);
    if (!error && count & 7 && packed[bytes - 1] & (255 >> (count & 7))) error = DAMAGED;
    if (!error) {
        for (size_t i = 0; i < count / 8; i++) { /* bit j of a byte to byte 7 - j of a word */
            u64 spread = ((u64)packed[i] * 0x8040201008040201u >> 7) & 0x0101010101010101u;
            put64(out + 8 * i, spread);
        }
        for (size_t i = count / 8 * 8; i < count; i++) out[i] = packed[i / 8] >> (7 - i % 8) & 1;
    }
    free(packed);
    return error;
}

static int decode_nibbles(const u8 *in, size_t size, u8 *out, size_t count, int level, int depth) {
    if (count > MOST) return DAMAGED;
    u8 *nibbles = malloc(2 * count + 1);
    if (!nibbles) return NO_MEMORY;
    int error = decode_body(in, size, nibbles, 2 * count, 1, level, depth);
    u8 high = 0;
    for (size_t i = 0; i < count && !error; i++) {
        high |= nibbles[2 * i] | nibbles[2 * i + 1];
        out[i] = (u8)(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
    }
    free(nibbles);
    return error ? error : high > 15 ? DAMAGED : OK;
}

static int decode_nonzero(const u8 *in, size_t size, u8 *out, size_t count, int width, int level, int depth) {
    u64 length;
    size_t n = get_varint(in, size, &length), kept = 0;
    if (!n || length > size - n) return DAMAGED;
    in += n, size -= n;
    u8 *mask = malloc(count), *values = NULL, over = 0;
    if (!mask) return NO_MEMORY;
    int error = decode_body(in, (size_t)length, mask, count, 1, level, depth);
    in += length, size -= (size_t)length;
    for (size_t i = 0; i < count && !error; i++) over |= mask[i], kept += mask[i];
    if (!error && (over > 1 || (!kept && size))) error = DAMAGED;
    if (!error && !kept) memset(out, 0, count * (size_t)width);
    if (!error && kept) {
        values = malloc((kept + 1) * (size_t)width);
        error = values ? decode_body(in, size, values, kept, width, level, depth) : NO_MEMORY;
        if (!error) spread(level, values, kept, mask, count, width, out);
    }
    free(values);
    free(mask);
    return error;
}

static int decode_body(const u8 *in, size_t size, u8 *out, size_t count, int width, int level, int depth) {
    if (!size || depth % WITHIN > DEPTH) return DAMAGED;
    const int kind = in[0];
    const size_t bytes = count * (size_t)width;
    in++, size--, depth++;
    switch (kind) {
    case RAW:
        if (size != bytes) return DAMAGED;
        memcpy(out, in, bytes);
        return OK;
    case CONSTANT:
        if (size != (size_t)width) return DAMAGED;
        if (width == 1) memset(out, in[0], count);
        else
            for (size_t i = 0; i < count; i++) memcpy(out + i * size, in, size);
        return OK;
    case SPLIT: return decode_split(in, size, out, count, width, level);
    case PLANES: return decode_planes(in, size, out, count, width, level, depth);
    case UPPER:
    case LOWER:
    case HALF: return decode_half(in, size, out, count, width, kind, level, depth);
    case OFFSET: {
        if (size < (size_t)width) return DAMAGED;
        int error = decode_body(in + width, size - (size_t)width, out, count, width, level, depth);
        if (!error) add(out, count, width, in);
        return error;
    }
    case BYTES: return width == 1 ? decode_symbols(in, size, in, (cut){1, 0, 0}, out, count, level) : DAMAGED;
    case NONZERO: /* in each other they would multiply the work */
        return depth < WITHIN ? decode_nonzero(in, size, out, count, width, level, depth + WITHIN) : DAMAGED;
    case BITS: return width == 1 ? decode_bits(in, size, out, count, level, depth) : DAMAGED;
    case NIBBLES: return width == 1 ? decode_nibbles(in, size, out, count, level, depth) : DAMAGED;
    default: return DAMAGED;
    }
}

/* Elements of a body.  level: -1 for the best of this machine. */
SMELT_API int smelt_chunk_decode(const u8 *body, size_t size, void *elements, size_t count, int width, int level) {
    const int best = best_level();
    if (width != 1 && width != 2 && width != 4 && width != 8) return WRONG_CALL;
    if (!count || count > MOST) return WRONG_CALL;
    return decode_body(body, size, elements, count, width, level < 0 || level > best ? best : level, 0);
}
