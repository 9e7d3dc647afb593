/* What it would cost to write symbols, and how to write them best. */
#include "price.h"

#include <stdlib.h>

enum { ESCAPE_BITS = 24 };

u32 log2_fixed(u32 v) {
    const int n = log2_of(v);
    u64 m = (u64)v << (31 - n); /* 1 <= m / 2^31 < 2 */
    u32 result = (u32)n;
    for (int i = 0; i < 16; i++) {
        m = m * m >> 31;
        result = result << 1 | (u32)(m >> 32);
        if (m >> 32) m >>= 1;
    }
    return result;
}

/* The symbols that occur, most frequent first; returns their number. */
static int sorted(const u32 *counts, u8 *order) {
    int used = 0;
    for (int s = 0; s < 256; s++) {
        if (!counts[s]) continue;
        int i = used++;
        for (; i && counts[order[i - 1]] < counts[s]; i--) order[i] = order[i - 1];
        order[i] = (u8)s;
    }
    return used;
}

/* With few symbols vectors compare faster than a table counts; those that a look at some has missed are counted in it. */
static size_t compare_symbols(const u8 *symbols, size_t count, int level, u32 *counts) {
#if defined(SMELT_X86)
    u8 order[256];
    u32 some[256];
    const size_t part = 4096;
    if (level < AVX512 || count < 8 * part) return 0;
    histogram(symbols + count / 2, part, PORTABLE, some);
    const int used = sorted(some, order);
    if (used <= 32) return histogram_avx512(symbols, count, order, used, counts);
#endif
    (void)symbols, (void)count, (void)level, (void)counts;
    return 0;
}

void histogram(const u8 *symbols, size_t count, int level, u32 *counts) {
    u32 t[4][256];
    memset(t, 0, sizeof t);
    size_t i = compare_symbols(symbols, count, level, t[0]);
    for (; i + 8 <= count; i += 8) {
        u64 v;
        memcpy(&v, symbols + i, 8);
        t[0][v & 255]++, t[1][v >> 8 & 255]++, t[2][v >> 16 & 255]++, t[3][v >> 24 & 255]++;
        t[0][v >> 32 & 255]++, t[1][v >> 40 & 255]++, t[2][v >> 48 & 255]++, t[3][v >> 56]++;
    }
    for (; i < count; i++) t[0][symbols[i]]++;
    for (int s = 0; s < 256; s++) counts[s] = t[0][s] + t[1][s] + t[2][s] + t[3][s];
}

/* ---- the price of a plane of symbols */

static int lanes_for(u64 bits) {
    u64 bytes = bits / BIT / 8;
    int lanes = 1;
    while (lanes < MAX_LANES && 800 * (u64)lanes <= bytes) lanes *= 2;
    return lanes;
}

/* The symbols under the first table of the plan, and the table. */
static u64 price_table(const choice *c, int entries) {
    const u32 whole = (u32)c->plan.precision << 16;
    u64 price = 0;
    for (int i = 0; i < entries; i++) {
        const u32 f = c->plan.freq[0][i];
        if (c->counts[i]) price += c->counts[i] * (u64)(whole - log2_fixed(f));
        price += BIT * (1 + 2 * (u64)log2_of(f + 1));
    }
    return price;
}

/* One table with `buckets` entries; the rarest symbols become escapes where there are more. */
static void price_rans(const u32 *counts, const u8 *order, int used, size_t count, int buckets, choice *c) {
    rans_plan *plan = &c->plan;
    const int escapes = used > buckets, kept = escapes ? buckets - 1 : used;
    u8 keep[256] = {0};
    int lowest = 255, highest = 0, n = 0;
    u64 rare = 0;
    for (int i = 0; i < kept; i++) {
        const int s = order[i];
        keep[s] = 1, lowest = s < lowest ? s : lowest, highest = s > highest ? s : highest;
    }
    plan->buckets = buckets, plan->tables = 1;
    plan->listed = highest - lowest + 1 + escapes > buckets;
    for (int s = lowest; s <= highest; s++)
        if (keep[s] || !plan->listed) {
            plan->values[n] = (u8)s;
            c->counts[n] = keep[s] ? counts[s] : 0;
            c->entry[s] = (u8)n++;
        }
    if (n < 2 && !escapes) { /* a second entry, which never comes */
        plan->listed = 1, plan->values[n] = (u8)(lowest ^ 1), c->counts[n++] = 0;
    }
    plan->escape = -1;
    if (escapes) {
        for (int i = kept; i < used; i++) rare += counts[order[i]];
        for (int s = 0; s < 256; s++)
            if (!keep[s]) c->entry[s] = (u8)n;
        plan->escape = n, plan->values[n] = 0, c->counts[n++] = (u32)rare;
    }
    plan->entries = n;
    /* The finest frequencies for many symbols; for few the precision at which the table weighs least with them. */
    u64 price = NONE;
    for (int p = count < 1 << 16 ? 8 : 14; p <= 14; p++) {
        if (n > 1 << p) continue;
        plan->precision = p;
        rans_normalise(c->counts, n, p, plan->freq[0]);
        const u64 now = price_table(c, n);
        if (now >= price) {
            plan->precision = p - 1;
            rans_normalise(c->counts, n, p - 1, plan->freq[0]);
            break;
        }
        price = now;
    }
    price += rare * ESCAPE_BITS * BIT;
    plan->lanes = lanes_for(price);
    c->price = price + BIT * (5 * 8 + 16 + (plan->listed ? 8 * (u64)n : 0) + 32 * (u64)plan->lanes);
    c->price += 160 * (u64)count; /* 0.0024 bits: states of few bits are coarse */
}

/* The best of the numbers of buckets.  256 of them must save 1/SLOWER. */
void price_plane(const u32 *counts, size_t count, choice *best) {
    u8 order[256];
    const int used = sorted(counts, order);
    price_rans(counts, order, used, count, used <= 16 ? 16 : 32, best);
    if (used > 32) {
        choice wide;
        price_rans(counts, order, used, count, 256, &wide);
        if (wide.price + wide.price / SLOWER < best->price) *best = wide;
    }
}

u64 price_huffman(const u32 *counts, size_t count) {
    int used = 0;
    for (int s = 0; s < 256; s++) used += counts[s] > 0;
    const int64_t bytes = used > 1 ? huffman_size(count, counts) : -1;
    return bytes < 0 ? NONE : (u64)bytes * 8 * BIT;
}

/* ---- several tables: blocks of 1024 symbols are grouped by what would code them best */

enum { ROUNDS = 2, ENTRIES = 32, BLOCKS = 1024, SAMPLE = 8 };

/* Counts and costs are int16, so that compilers multiply them eight and more at a time. */
typedef struct {
    int16_t counts[BLOCKS][ENTRIES];
    u32 feature[BLOCKS];
    u8 classes[BLOCKS];
} block_counts;

static void count_block(const u8 *entries, size_t number, int used, int level, int16_t *counts) {
#if defined(SMELT_X86)
    if (level >= AVX512) {
        memset(counts, 0, ENTRIES * sizeof *counts);
        count_avx512(entries, number, used, counts);
        return;
    }
#endif
    (void)level, (void)used;
    u32 t[4][256];
    size_t j = 0;
    for (int i = 0; i < 4; i++) memset(t[i], 0, ENTRIES * sizeof(u32));
    for (; j + 8 <= number; j += 8) {
        u64 v;
        memcpy(&v, entries + j, 8);
        t[0][v & 255]++, t[1][v >> 8 & 255]++, t[2][v >> 16 & 255]++, t[3][v >> 24 & 255]++;
        t[0][v >> 32 & 255]++, t[1][v >> 40 & 255]++, t[2][v >> 48 & 255]++, t[3][v >> 56]++;
    }
    for (; j < number; j++) t[0][entries[j]]++;
    for (int s = 0; s < ENTRIES; s++) counts[s] = (int16_t)(t[0][s] + t[1][s] + t[2][s] + t[3][s]);
}

/* In 1/1024 bit. */
static void costs_of(const u32 *counts, int entries, int16_t *cost) {
    u32 total = 0;
    for (int s = 0; s < entries; s++) total += counts[s] + 1;
    const u32 whole = log2_fixed(total);
    for (int s = 0; s < ENTRIES; s++) cost[s] = s < entries ? (int16_t)((whole - log2_fixed(counts[s] + 1)) >> 6) : 0;
}

static u32 cost_of(const int16_t *counts, const int16_t *cost) {
    int sum = 0; /* at most 1024 * 20 * 1024 */
    for (int s = 0; s < ENTRIES; s++) sum += counts[s] * cost[s];
    return (u32)sum;
}

/* Equally many blocks in each of the groups, by their price under the single table. */
static void first_groups(block_counts *b, size_t blocks, int tables) {
    u32 low = ~(u32)0, high = 0, bins[256] = {0};
    for (size_t i = 0; i < blocks; i++) {
        low = b->feature[i] < low ? b->feature[i] : low;
        high = b->feature[i] > high ? b->feature[i] : high;
    }
    const u64 range = (u64)(high - low) + 1;
    for (size_t i = 0; i < blocks; i++) bins[(u64)(b->feature[i] - low) * 256 / range]++;
    for (u32 i = 0, before = 0; i < 256; i++) {
        const u32 here = bins[i];
        bins[i] = (u32)((before + here / 2) * (u64)tables / blocks), before += here;
    }
    for (size_t i = 0; i < blocks; i++) b->classes[i] = (u8)bins[(u64)(b->feature[i] - low) * 256 / range];
}

static void sum_groups(const block_counts *b, const u8 *classes, size_t blocks, u32 sums[][ENTRIES]) {
    memset(sums, 0, MAX_TABLES * sizeof *sums);
    for (size_t i = 0; i < blocks; i++)
        for (int s = 0; s < ENTRIES; s++) sums[classes[i]][s] += (u32)b->counts[i][s];
}

static u64 head_bits(int entries, int tables) { return BIT * (u64)tables * (u64)entries * 17; }

/* Groups the blocks anew, a few times; returns the price, tables and classes included. */
static u64 group(block_counts *b, size_t blocks, int entries, int tables) {
    u32 sums[MAX_TABLES][ENTRIES];
    int16_t cost[MAX_TABLES][ENTRIES];
    u64 price = 0;
    first_groups(b, blocks, tables);
    for (int round = 0; round <= ROUNDS; round++) {
        sum_groups(b, b->classes, blocks, sums);
        for (int t = 0; t < tables; t++) costs_of(sums[t], entries, cost[t]);
        price = 0;
        for (size_t i = 0; i < blocks; i++) {
            u32 least = ~(u32)0;
            for (int t = 0; t < tables; t++) {
                const u32 here = cost_of(b->counts[i], cost[t]);
                if (here < least) least = here, b->classes[i] = (u8)t;
            }
            price += (u64)least << 6;
        }
    }
    return price + head_bits(entries, tables) + BIT * blocks * (tables == 2 ? 1 : tables <= 4 ? 2 : 3);
}

static void map_symbols(const u8 *map, const u8 *symbols, size_t count, int level, u8 *entries) {
    size_t i = 0;
#if defined(SMELT_X86)
    if (level >= AVX512) i = count / 64 * 64, map_avx512(map, symbols, i, entries);
#endif
    (void)level;
    for (; i < count; i++) entries[i] = map[symbols[i]];
}

/* Counts every `step`th block from the first on; returns the price of all symbols in them under the single table. */
static u64 count_blocks(block_counts *b, const u8 *entries, size_t count, size_t step, int used, int level,
                        const int16_t *single) {
    u64 price = 0;
    for (size_t i = 0, begin = 0; begin < count; i++, begin += step * BLOCK) {
        const size_t number = count - begin < BLOCK ? count - begin : BLOCK;
        count_block(entries + begin, number, used, level, b->counts[i]);
        b->feature[i] = cost_of(b->counts[i], single);
        price += (u64)b->feature[i] << 6;
    }
    return price;
}

int map_and_group(choice *c, const u8 *symbols, size_t count, int level, u8 *entries, u8 *classes) {
    const size_t blocks = (count + BLOCK - 1) / BLOCK;
    rans_plan *plan = &c->plan;
    map_symbols(c->entry, symbols, count, level, entries);
    if (plan->buckets > ENTRIES || plan->lanes != LANES || blocks < 16 || blocks > BLOCKS) return OK;
    block_counts *b = malloc(sizeof *b);
    if (!b) return NO_MEMORY;
    int16_t single[ENTRIES];
    costs_of(c->counts, plan->entries, single);
    u64 alone, best = 0;
    if (blocks >= 8 * SAMPLE) { /* a look at some of the blocks first: most tensors have nothing to gain */
        alone = count_blocks(b, entries, count, SAMPLE, plan->entries, level, single);
        best = alone - alone / 256 + head_bits(plan->entries, MAX_TABLES);
        if (group(b, (blocks + SAMPLE - 1) / SAMPLE, plan->entries, MAX_TABLES) > best) goto end;
    }
    alone = count_blocks(b, entries, count, 1, plan->entries, level, single) + head_bits(plan->entries, 1);
    best = alone - alone / 1000;
    for (int tables = MAX_TABLES; tables > 1; tables /= 2) {
        const u64 price = group(b, blocks, plan->entries, tables);
        if (tables == MAX_TABLES && price > alone + alone / 500) break;
        if (price < best) best = price, plan->tables = tables, memcpy(classes, b->classes, blocks);
    }
    if (plan->tables > 1) {
        u32 sums[MAX_TABLES][ENTRIES];
        sum_groups(b, classes, blocks, sums);
        for (int t = 0; t < plan->tables; t++) {
            u32 all = 0;
            for (int s = 0; s < plan->entries; s++) all += sums[t][s];
            if (!all) sums[t][0] = 1;
            rans_normalise(sums[t], plan->entries, plan->precision, plan->freq[t]);
        }
    }
end:
    free(b);
    return OK;
}
