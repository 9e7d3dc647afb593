#!/bin/sh
# fuzz/run.sh SECONDS [TARGET]: fuzzes the C library; TARGET is decode_chunk (the default) or round_trip.
# Inputs that reach something new are kept in fuzz/.work/TARGET, and those that fail in fuzz/.work.
set -eu
seconds=${1:?seconds}
target=${2:-decode_chunk}
cd "$(dirname "$0")"
mkdir -p ".work/$target"

native=../src/smelt/native
library=$(ls $native/*.c | grep -v -e module.c -e kmeans)
[ "$target" = round_trip ] && without=$native/encode.c || without=none
flags="-std=c11 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -I $native
    -Dmalloc=watched_malloc -Dcalloc=watched_calloc -Dfree=watched_free"
clang=${CLANG:-clang}

if [ ! -e ".work/$target.run" ] || [ "$(find . $native -maxdepth 1 -name '*.[ch]' -newer ".work/$target.run")" ]; then
    $clang $flags -fsanitize=address,undefined -o .work/seeds seeds.c bodies.c memory.c $library -lm
    $clang $flags -fsanitize=fuzzer,address,undefined -o ".work/$target.run" "$target.c" bodies.c memory.c \
        $(echo "$library" | grep -vx "$without") -lm
    [ "$target" != decode_chunk ] || .work/seeds .work/decode_chunk 1500
fi

cd .work
exec "./$target.run" "$target" -max_total_time="$seconds" -max_len=16384 -len_control=0 -timeout=10 \
    -malloc_limit_mb=32 -rss_limit_mb=1024 -print_final_stats=1 -artifact_prefix="$target-"
