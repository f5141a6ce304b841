#!/usr/bin/env bash
# All that needs a GPU: builds the kernels, checks them, runs the notebooks' cells marked `#| cuda` and the benchmark of notebook 15.
# A part that fails, or takes longer than its limit, does not stop the others; all end within $LIMIT seconds (350).
# What each part says goes to $OUT/NAME.log ($OUT: gpu_logs). Needs torch with CUDA, nvcc, ninja, fastcore, accelerate, matplotlib, hypothesis; no nbdev, no network.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=$(realpath -m "${OUT:-gpu_logs}") PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3} limit=${LIMIT:-350} failed=0
mkdir -p "$OUT"
part() { # name, seconds, command
  local name=$1 left=$((limit - SECONDS)) most=$2 start=$SECONDS
  shift 2
  if [ "$left" -lt 5 ]; then echo "$name: no time left"; return 1; fi
  timeout -k 5 "$((most < left ? most : left))" "$@" >"$OUT/$name.log" 2>&1
  local rc=$?
  echo "$name: $([ $rc = 0 ] && echo ok || { [ $rc = 124 ] && echo "stopped after its time" || echo "FAILED ($rc)"; }), $((SECONDS - start)) s; $(tail -n 1 "$OUT/$name.log")"
  return $rc
}
"$python" -c 'from importlib.metadata import entry_points as e; import sys; sys.exit(not e(group="resnet_bk.kernels"))' ||
  "$python" setup.py -q egg_info || failed=1        # the package announces its kernels by entry points
part machine 30 bash -c "nvidia-smi; nvcc --version; $python -c 'import torch, sys; print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'" || failed=1
part build 200 "$python" - <<'PY' || failed=1
import time, torch
from resnet_bk import cpu_kernels, decoder, fused_layers, gauge, gauge_cuda, hardware, native
t = time.perf_counter()
cuda = [hardware.DEVICE, *(k['cuda'].library for k in (hardware.LAYER_KERNELS, hardware.ATTENTION_KERNELS)), gauge_cuda.FRAMES.library]
assert native.ready(*cuda), 'no CUDA kernels'
print(f'{len(cuda)} CUDA libraries for {hardware.DEVICE.archs}: {time.perf_counter() - t:.0f} s')
t = time.perf_counter()
host = [hardware.HOST, *(k['cpu'].library for k in (hardware.LAYER_KERNELS, hardware.ATTENTION_KERNELS))]
host += [*cpu_kernels.CORE.values(), *fused_layers.LAYER.values(), *fused_layers.ATTENTION.values(), decoder.DECODE]
host += [gauge_cuda.EMULATED_FRAMES.library, *gauge.GAUGE.values()]
assert native.ready(*host), 'no C++ kernels'
print(f'{len(host)} libraries of the host: {time.perf_counter() - t:.0f} s')
PY
part check 60 "$python" -m resnet_bk.hardware check || failed=1
part bench 110 "$python" -m resnet_bk.benchmarks gpu || failed=1
part commands 150 bash -c "
  set -e
  run=\$(mktemp -d)/run
  $python -m resnet_bk.cli train --preset wide --minutes .4 --folder \$run --quiet
  $python -m resnet_bk.cli generate \$run --prompt 'def ' --n 100 --device cuda --seed 0
  $python -m resnet_bk.cli train --minutes .6 --folder \$run-2 --quiet
  $python -m resnet_bk.cli train --resume --folder \$run-2 --minutes .7 --quiet
  $python -m resnet_bk.cli train --minutes .3 --mixed_precision fp16 --folder \$run-3 --quiet" || failed=1
for nb in 03_moe 05_learner 05e_own_loop 10_hardware 10b_gauge_cuda; do part "$nb" 120 "$python" .ci/cells.py "nbs/$nb.ipynb" & jobs+=($!); done
for j in "${jobs[@]}"; do wait "$j" || failed=1; done
exit $failed
