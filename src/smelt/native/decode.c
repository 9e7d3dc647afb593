/* Chunks back to elements (docs/format.md, "The entropy stream").  Nothing in a chunk is believed: a length, a
   position or a state that cannot be gives DAMAGED, and nothing outside in[0..size) and out[0..count * width) is touched. */
#include <stdlib.h>

#include "rans.h"
#include "symbols.h"

enum { DEPTH = 8 };
enum { WITHIN = 16 /* added to the depth inside of NONZERO */ };

static int decode_body(const u8 *in, size_t size, u8 *out, size_t count, int width, int level, int depth);

/* `crc`: what the body, which begins a byte before `in`, should have; or NULL. */
static int decode_split(const u8 *in, size_t size, u8 *out, size_t count, int width, int level, const u32 *crc) {
    if (!size || in[0] & 128) return DAMAGED;
    const cut c = {width, in[0] & 63, in[0] >> 6};
    const int bits = 8 * width - c.rest;
    const size_t raw = 1 + parts_size(count, c.rest);
    if (bits < 1 || bits > 8 || size < raw) return DAMAGED;
    checksum sum = {0};
    if (crc) { /* [kind and cut, a part], [a part], ..., [symbols] */
        const u8 *at = in + 1;
        sum.crc = *crc;
        for (int part = 32; part; part /= 2)
            if (c.rest & part) {
                const u8 *end = at + parts_size(count, part);
                sum.pieces[sum.number++] = (piece){at, at, end, 0};
                at = end;
            }
        sum.pieces[sum.number++] = (piece){at, at, in + size, 0};
        sum.pieces[0].begin = sum.pieces[0].at = in - 1;
        sum_up(&sum.pieces[0], in + 1, level);
        if (sum.number > 1) sum.pieces[0].begin = in + 1;
    }
    return decode_symbols(in + raw, size - raw, in + 1, c, out, count, level, &sum);
}

static int decode_bytes(const u8 *in, size_t size, u8 *out, size_t count, int level, const u32 *crc) {
    checksum sum = {0};
    if (crc) sum.number = 1, sum.crc = *crc, sum.pieces[0] = (piece){in - 1, in - 1, in + size, 0};
    return decode_symbols(in, size, in, (cut){1, 0, 0}, out, count, level, &sum);
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
    case SPLIT: return decode_split(in, size, out, count, width, level, NULL);
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
    case BYTES: return width == 1 ? decode_bytes(in, size, out, count, level, NULL) : DAMAGED;
    case NONZERO: /* in each other they would multiply the work */
        return depth < WITHIN ? decode_nonzero(in, size, out, count, width, level, depth + WITHIN) : DAMAGED;
    case BITS: return width == 1 ? decode_bits(in, size, out, count, level, depth) : DAMAGED;
    case NIBBLES: return width == 1 ? decode_nibbles(in, size, out, count, level, depth) : DAMAGED;
    default: return DAMAGED;
    }
}

/* -1: the best of this machine; PAST_CACHE: the same, for elements of more bytes than the cache has. */
static int used_level(int level) {
    const int best = best_level();
    if (level == PAST_CACHE && best == AVX512) return PAST_CACHE;
    return level < 0 || level > best ? best : level;
}

/* Elements of a body; `level` as in used_level. */
SMELT_API int smelt_chunk_decode(const u8 *body, size_t size, void *elements, size_t count, int width, int level) {
    if (width != 1 && width != 2 && width != 4 && width != 8) return WRONG_CALL;
    if (!count || count > MOST) return WRONG_CALL;
    return decode_body(body, size, elements, count, width, used_level(level), 0);
}

/* The same, and DAMAGED where the CRC-32 of the body differs; it is taken while the body is decoded, if it can be. */
SMELT_API int smelt_chunk_decode_checked(const u8 *body, size_t size, void *elements, size_t count, int width,
                                         int level, u32 crc) {
    const int used = used_level(level);
    if ((width != 1 && width != 2 && width != 4 && width != 8) || !count || count > MOST) return WRONG_CALL;
    if (size && body[0] == SPLIT) return decode_split(body + 1, size - 1, elements, count, width, used, &crc);
    if (size && body[0] == BYTES && width == 1) return decode_bytes(body + 1, size - 1, elements, count, used, &crc);
    if (crc32_at(used, 0, body, size) != crc) return DAMAGED;
    return decode_body(body, size, elements, count, width, used, 0);
}
