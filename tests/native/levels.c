/* For a machine that Python does not run on (test_arm.py): every line of the input is "width count path" of a body; the
   line of output has, for the portable level and the best, the result and the CRC-32 of the elements, then the size and
   the CRC-32 of what encoding the elements gives. */
#include <stdio.h>
#include <stdlib.h>

#include "native.h"

int smelt_chunk_decode(const u8 *, size_t, void *, size_t, int, int);
int64_t smelt_chunk_encode(const void *, size_t, int, int, int, u8 *, size_t);

int main(void) {
    static u8 body[1 << 16];
    int width;
    size_t count;
    char path[1000];
    while (scanf("%d %zu %999[^\n]", &width, &count, path) == 3) {
        FILE *file = fopen(path, "rb");
        if (!file) return 1;
        const size_t size = fread(body, 1, sizeof body, file);
        fclose(file);
        u8 *exact = malloc(size ? size : 1), *out = malloc(count * (size_t)width), *again = malloc(count * (size_t)width + 1);
        int result = 0;
        memcpy(exact, body, size);
        for (int level = PORTABLE; level <= SIMD; level++) {
            result = smelt_chunk_decode(exact, size, out, count, width, level);
            printf("%d %u ", result, result ? 0 : smelt_crc32(0, out, count * (size_t)width));
        }
        const int64_t n = result ? 0 : smelt_chunk_encode(out, count, width, 0, 0, again, count * (size_t)width + 1);
        printf("%d %u\n", (int)n, n > 0 ? smelt_crc32(0, again, (size_t)n) : 0);
        free(exact), free(out), free(again);
    }
    return 0;
}
