#!/bin/sh
# fuzz/coverage.sh [TARGET]: which lines of the C library the inputs kept by run.sh reach (clang, llvm-cov).
set -eu
target=${1:-decode_chunk}
cd "$(dirname "$0")"
native=../src/smelt/native
library=$(ls $native/*.c | grep -v -e module.c -e kmeans)
[ "$target" = round_trip ] && without=$native/encode.c || without=none
${CLANG:-clang} -std=c11 -g -O1 -I $native -Dmalloc=watched_malloc -Dcalloc=watched_calloc -Dfree=watched_free -fsanitize=fuzzer,address -fprofile-instr-generate -fcoverage-mapping \
    -o ".work/$target.cov" "$target.c" bodies.c memory.c $(echo "$library" | grep -vx "$without") -lm
cd .work
LLVM_PROFILE_FILE=$target.raw "./$target.cov" -runs=0 "$target" 2> /dev/null
llvm-profdata merge -o "$target.prof" "$target.raw"
llvm-cov report "./$target.cov" -instr-profile="$target.prof" -show-functions=0 \
    $(for file in $library; do readlink -f "../$file"; done)
