/* seeds FOLDER NUMBER: inputs of decode_chunk to begin with: by the encoder, and of every other kind. */
#include <stdio.h>
#include <stdlib.h>

#include "bodies.h"

enum { ROOM = 1 << 14, ELEMENTS = 1 << 20 };

static int number;

static void save(const char *folder, const u8 *input, size_t size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%05d", folder, number++);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(input, 1, size, file) != size || fclose(file)) exit(1);
}

int main(int argc, char **argv) {
    static u8 elements[8 * ELEMENTS], input[ROOM];
    const int wanted = argc == 3 ? atoi(argv[2]) : 0;
    if (!wanted) return 2;
    for (u32 i = 0; number < wanted; i++) {
        dice d = dice_of((const u8 *)&i, sizeof i);
        d.left = 0, noise(&d);
        const int width = 1 << roll(&d, 4);
        size_t count = some_count(&d), n;
        if (i % 3) {
            if (i % 100 == 1) count = ELEMENTS - roll(&d, 2000);
            fill(&d, width, count, elements);
            const int kind = kind_for(&d, width), coder = (int)roll(&d, 3);
            const int64_t m = smelt_chunk_encode(elements, count, width, kind, coder, input + HEAD, ROOM - HEAD);
            n = m > 0 ? (size_t)m : 0;
        } else n = make_body(&d, width, count, elements, input + HEAD, ROOM - HEAD);
        if (!n) continue;
        write_head(input, width, count);
        save(argv[1], input, n + HEAD);
    }
    return 0;
}
