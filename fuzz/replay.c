/* replay FILE...: runs a target on kept inputs where there is no libFuzzer, as on other machines and under emulators. */
#include <stdio.h>
#include <stdlib.h>

#include "bodies.h"

int LLVMFuzzerTestOneInput(const u8 *data, size_t size);
size_t LLVMFuzzerMutate(u8 *data, size_t size, size_t most);

size_t LLVMFuzzerMutate(u8 *data, size_t size, size_t most) { return (void)data, (void)most, size; }

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file) return 2;
        fseek(file, 0, SEEK_END);
        const size_t size = (size_t)ftell(file);
        rewind(file);
        u8 *data = malloc(size);
        if (fread(data, 1, size, file) != size) return 2;
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
        free(data);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
