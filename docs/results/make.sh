#!/bin/sh
# Recreates the results at mini scale; run it from the repository's root:
#   docs/results/make.sh [alignment] [features] [pca] [headroom] [bill] [views] [resolution] [gates] [tables]
# Needs florence-vl[analyze], florence-vl-mini, and the packages that `florence-vl analyze encoders` names. An
# interrupted run resumes: features are cached, and training runs continue from their checkpoints.
set -eu
data=data/mini/test-captions
out=${OUT:-runs/mini-results}
photos=$(python -c 'import florence_vl_mini as m; print(" ".join(p["file"] for p in m.photos() if p["id"] in ("astronaut", "chelsea", "coffee")))')
for set in test-captions known; do [ -f data/mini/$set/data.jsonl ] || florence-vl mini data --set $set; done
for part in ${*:-alignment features pca headroom bill views resolution gates tables}; do
  case $part in
    alignment)
      florence-vl analyze alignment --encoders dinov2_small_focus:layer6+last dinov2_small_focus efficientnet_lite0 \
        florence2_mini --data $data/data.jsonl --dtype bfloat16 --seeds ${FIGURE_SEEDS:-10} --out $out/alignment ;;
    features)
      florence-vl analyze alignment --encoders florence2_mini --ablate --temperature 0.07 --center --data data/mini/known/data.jsonl \
        --dtype bfloat16 --seeds ${FIGURE_SEEDS:-10} --out $out/features ;;
    pca)
      # shellcheck disable=SC2086
      florence-vl analyze pca $photos --encoder florence2_mini dinov2_small_focus:layer6+last@448 \
        efficientnet_lite0:block10@448 --out $out/pca
      scenes=$(for i in 4 60 92 144 170 254; do echo data/mini/known/images/train-50-$i-detailed_caption.jpg; done)
      # shellcheck disable=SC2086
      florence-vl analyze pca $scenes --encoder florence2_mini dinov2_small_focus:layer6+last@448 --out $out/pca-scenes ;;
    headroom)
      florence-vl analyze headroom --model mini --suite mini --size 256 128 --limit ${LIMIT:-16} --dtype ${DTYPE:-auto} --out $out/headroom
      florence-vl analyze headroom --model mini --suite mini_drawings --size 256 128 --limit ${DRAWINGS:-90} --dtype ${DTYPE:-auto} \
        --out $out/headroom_drawings ;;
    bill)
      florence-vl analyze bill --model mini --suite mini_drawings --size 256 192 128 --limit ${DRAWINGS:-60} --dtype ${DTYPE:-auto} \
        --out $out/bill ;;
    views)
      florence-vl analyze bill --model mini --suite mini_drawings --subsets views --limit ${DRAWINGS:-300} --dtype ${DTYPE:-auto} \
        --trade 0 --trade 0.1 --trade 0.3 --trade 1 --trade 2 --out $out/views ;;
    resolution)
      evaluate() { florence-vl evaluate --model mini --suite mini_drawings --dtype ${DTYPE:-auto} --out $out/resolution/"$@"; }
      evaluate 256
      for size in 320 320x192 448x256; do
        [ -d data/drawings-$size ] || florence-vl mini suite mini_drawings --size $size --out data/drawings-$size
      done
      for positions in absolute resampled; do
        evaluate 320-$positions --data data/drawings-320 --image-size 320 --positions $positions
        evaluate 320x192-$positions --data data/drawings-320x192 --aspect native --positions $positions
      done
      evaluate 448x256-resampled --data data/drawings-448x256 --aspect native --token-budget 112 --positions resampled
      for size in 320x192 448x256; do
        for aspect in squash pad; do evaluate $size-$aspect --data data/drawings-$size --aspect $aspect; done
      done
      for run in 320-absolute 320-resampled 320x192-absolute 320x192-resampled 320x192-squash 320x192-pad 448x256-resampled \
          448x256-squash 448x256-pad; do
        florence-vl evaluate compare $out/resolution/256 $out/resolution/$run
      done
      for size in 320x192 448x256; do
        for aspect in squash pad; do
          florence-vl evaluate compare $out/resolution/$size-$aspect $out/resolution/$size-resampled
        done
      done ;;
    gates)
      for set in newcomers questions; do [ -f data/mini/$set/data.jsonl ] || florence-vl mini data --set $set; done
      data_of_gates='[{path: data/mini/newcomers/data.jsonl, name: newcomers}, {path: data/mini/questions/data.jsonl, name: questions}]'
      set -- without=mini
      for context in none image question; do
        models=
        for seed in 0 1 2; do
          run=$out/gates/$context-$seed
          [ -d $run/model ] || florence-vl train mini/gate model.path=mini model.gate.context=$context seed=$seed output=$run \
            steps=100 batch_size=2 "data.sources=$data_of_gates" 'data.views={full: 1}' model.feature_store=$out/gates/features --resume auto
          models=${models:+$models,}$run/model
        done
        set -- "$@" $context=$models
      done
      florence-vl analyze gates --model "$@" --suite mini_drawings --dtype ${DTYPE:-auto} --out $out/gates/drawings
      florence-vl analyze gates --model "$@" --suite mini --limit ${GATES:-75} --dtype ${DTYPE:-auto} --out $out/gates/mini ;;
    tables)  # rows that are already in docs/results/tables.tar.xz are not trained again
      [ -d $out/ablations ] || { mkdir -p $out && tar -xf docs/results/tables.tar.xz -C $out; }
      for table in ${TABLES:-5 6 4 1}; do
        florence-vl ablate --scale mini --start mini --table $table --seeds ${SEEDS:-8} --dtype bfloat16 \
          --set pretrain:steps=10 --set finetune:steps=30 ${JOBS:+--jobs $JOBS} --out $out/ablations
      done
      # the other start, with the default steps: 30 and 90
      florence-vl ablate --scale mini --start smollm2 --table 5 --seeds ${START_SEEDS:-2} --dtype bfloat16 \
        ${JOBS:+--jobs $JOBS} --out $out/ablations
      (cd $out && find ablations -path '*/evaluate/done.json' | sed 's#/evaluate/done.json$##' | LC_ALL=C sort | while read -r run; do
        for file in pretrain/done.json finetune/done.json evaluate/done.json evaluate/run.json evaluate/answers.jsonl; do
          echo $run/$file
        done
      done | tar -cJf tables.tar.xz --owner=0 --group=0 --mtime=2026-01-01 -T -) ;;
    *) echo "unknown part: $part (alignment, features, pca, headroom, bill, views, resolution, gates, tables)" >&2; exit 2 ;;
  esac
done
florence-vl analyze report $out
