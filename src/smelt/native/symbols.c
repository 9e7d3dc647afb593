/* Planes of symbols back to elements: runs of the vector decoders, escapes, checksums taken on the way. */
#include "symbols.h"

#include <stdlib.h>

#include "folding.h"
#include "rans.h"

enum { BATCH = 8192, STRIDE = 32768 /* of what needs no room for symbols */ };

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

void sum_up(piece *p, const u8 *to, int level) {
    p->crc = crc32_at(level, p->crc, p->at, (size_t)(to - p->at));
    p->at = to;
}

/* Everything that belongs to elements before `begin`, and the words before `words`. */
static void sum_before(checksum *sum, cut c, size_t begin, const u8 *words, int level) {
    int bits = 32;
    for (int i = 0; i + 1 < sum->number; i++, bits /= 2) {
        piece *p = &sum->pieces[i];
        while (!(c.rest & bits)) bits /= 2;
        const u8 *to = p->begin + (bits >= 8 ? begin * (size_t)bits / 8 : begin / 128 * 16 * (size_t)bits);
        if (to > p->at && to <= p->end) sum_up(p, to, level);
    }
    if (sum->number) sum_up(&sum->pieces[sum->number - 1], words, level);
}

static int sum_is_right(checksum *sum, int level) {
    u32 crc = 0;
    for (int i = 0; i < sum->number; i++) {
        piece *p = &sum->pieces[i];
        sum_up(p, p->end, level);
        crc = crc32_joined(crc, p->crc, (size_t)(p->end - p->begin));
    }
    return !sum->number || crc == sum->crc;
}

enum { TAIL = 256 /* bytes that a vector decoder wants to see behind the words it takes */ };

typedef struct {
    rans_plan plan;
    rans_table table[MAX_TABLES];
    rans_lanes lanes;
    const u8 *end;     /* of the words */
    u8 tail[2 * TAIL]; /* the last words, and zeros behind them */
    u8 symbols[BATCH];
} workspace;

/* Moves the last words to where more may be read, so that vector decoders go on to the end. */
static void extend_words(workspace *work) {
    rans_lanes *lanes = &work->lanes;
    const size_t left = (size_t)(lanes->end - lanes->words);
    if (lanes->end != work->end || left >= TAIL) return;
    memcpy(work->tail, lanes->words, left);
    memset(work->tail + left, 0, sizeof work->tail - left);
    lanes->words = work->tail, work->end = work->tail + left, lanes->end = work->end + TAIL;
}

/* `count` symbols, the first of which is the `begin`th of the plane. */
static int run(workspace *work, const u8 *classes, size_t begin, size_t count, u8 *out, int level) {
    rans_lanes *lanes = &work->lanes;
    const int number = work->plan.lanes, several = work->plan.tables > 1;
    for (size_t done = 0; done < count;) {
        const size_t left = count - done, rest_of_block = BLOCK - (begin + done) % BLOCK;
        const size_t now = several && rest_of_block < left ? rest_of_block : left;
        const u8 *class = several ? classes + (begin + done) / BLOCK : NULL;
        const rans_table *table = &work->table[class ? *class : 0];
        size_t steps = 0;
        extend_words(work);
#if defined(SMELT_X86)
        if (number == LANES && level >= AVX512 && (!class || rest_of_block == BLOCK))
            steps = rans_run_avx512(work->table, class, lanes, left / LANES, out + done);
        if (number == LANES && !steps && (level == SIMD || (level > SIMD && work->plan.buckets == 256)))
            steps = rans_run_avx2(table, lanes, now / LANES, out + done);
#elif defined(SMELT_NEON)
        if (number == LANES && level >= SIMD) steps = rans_run_neon(table, lanes, now / LANES, out + done);
#endif
        done += LANES * steps;
        if (steps) continue;
        if (rans_run_portable(table, lanes, number, now, out + done) != OK) return DAMAGED;
        done += now;
    }
    (void)level;
    return OK;
}

static int decode_rans(const u8 *in, size_t size, const u8 *parts, cut c, u8 *out, size_t count, int level,
                       workspace *work, u8 *classes, checksum *sum) {
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
    lanes->words = in, lanes->end = work->end = in + size - 4 * (size_t)number;
    for (int t = 0; t < plan->tables; t++) rans_build(plan, t, &work->table[t], NULL);

    const u8 *const end = lanes->end;
    const int straight = c.width == 1 && !c.rest && !c.rotate;
    for (size_t begin = 0; begin < count;) {
        size_t now = count - begin < STRIDE ? count - begin : STRIDE, done = 0;
#if defined(SMELT_X86)
        if (c.width == 2 && c.rest == 8 && c.rotate && level >= AVX512 && number == LANES && begin % BLOCK == 0) {
            const u8 *class = plan->tables > 1 ? classes + begin / BLOCK : NULL;
            extend_words(work);
            piece *p = sum->number > 1 && has_wide_folding() ? &sum->pieces[0] : NULL; /* that of `parts` */
            const int follows = p && p->at == parts + begin;
            done = LANES * rans_run_bf16_avx512(work->table, class, lanes, now / LANES, parts + begin, out + 2 * begin,
                                                level == PAST_CACHE, follows ? &p->crc : NULL);
            if (follows) p->at += done;
            for (; e.position < begin + done; next_escape(&e)) {
                u32 x = (u32)e.symbol << 8 | parts[e.position];
                put16(out + 2 * e.position, (u16)(x >> 1 | x << 15));
            }
        }
#endif
        if (!done) {
            if (!straight && now > BATCH) now = BATCH;
            u8 *symbols = straight ? out + begin : work->symbols;
            if (run(work, classes, begin, now, symbols, level) != OK) return DAMAGED;
            for (; e.position < begin + now; next_escape(&e)) symbols[e.position - begin] = e.symbol;
            if (!narrow_enough(symbols, now, 8 * c.width - c.rest)) return DAMAGED;
            if (!straight) join_elements(level, c, symbols, parts, count, begin, now, out + (size_t)c.width * begin);
            done = now;
        }
        begin += done;
        sum_before(sum, c, begin, lanes->end == end ? lanes->words : end, level);
    }
    if (lanes->words != work->end) return DAMAGED;
    for (int i = 0; i < number; i++)
        if (lanes->high[i] != 1 || lanes->low[i]) return DAMAGED;
    return sum_is_right(sum, level) ? OK : DAMAGED;
}

int decode_symbols(const u8 *in, size_t size, const u8 *parts, cut c, u8 *out, size_t count, int level,
                          checksum *sum) {
    int error;
    if (!size) return DAMAGED;
    if (in[0] >> 4 == 1) {
        workspace *work = malloc(sizeof *work + count / BLOCK + 1);
        if (!work) return NO_MEMORY;
        error = decode_rans(in, size, parts, c, out, count, level, work, (u8 *)(work + 1), sum);
        free(work);
        return error;
    }
    if (!sum_is_right(sum, level)) return DAMAGED;
    if (c.width == 1 && !c.rest && !c.rotate) return huffman_decode(in, size, out, count);
    u8 *plane = malloc(count);
    if (!plane) return NO_MEMORY;
    error = huffman_decode(in, size, plane, count);
    if (!error && !narrow_enough(plane, count, 8 * c.width - c.rest)) error = DAMAGED;
    if (!error) join_elements(level, c, plane, parts, count, 0, count, out);
    free(plane);
    return error;
}
