#!/bin/sh
# Makes the mini results again, from the repository's root: docs/results/make.sh [alignment] [features] [pca] [tables]
# Needs florence-vl[analyze], florence-vl-mini, and the packages that `florence-vl analyze encoders` names. What was
# interrupted goes on: features are cached, and trainings resume.
set -eu
data=data/mini/test-captions
out=${OUT:-runs/mini-results}
photos=$(python -c 'import florence_vl_mini as m; print(" ".join(p["file"] for p in m.photos() if p["id"] in ("astronaut", "chelsea", "coffee")))')
for set in test-captions known; do [ -f data/mini/$set/data.jsonl ] || florence-vl mini data --set $set; done
for part in ${*:-alignment features pca tables}; do
  case $part in
    alignment)
      florence-vl analyze alignment --encoders dinov2_small_focus:layer6+last dinov2_small_focus efficientnet_lite0 \
        florence2_mini --data $data/data.jsonl --out $out/alignment ;;
    features)
      florence-vl analyze alignment --encoders florence2_mini --ablate --temperature 0.07 --center --data data/mini/known/data.jsonl \
        --out $out/features ;;
    pca)
      # shellcheck disable=SC2086
      florence-vl analyze pca $photos --encoder florence2_mini dinov2_small_focus:layer6+last@448 \
        efficientnet_lite0:block10@448 --out $out/pca
      scenes=$(for i in 4 60 92 144 170 254; do echo data/mini/known/images/train-50-$i-detailed_caption.jpg; done)
      # shellcheck disable=SC2086
      florence-vl analyze pca $scenes --encoder florence2_mini dinov2_small_focus:layer6+last@448 --out $out/pca-scenes ;;
    tables)
      for table in 1 4 5 6; do florence-vl ablate --table $table --scale mini --limit 30 --set precision=${PRECISION:-fp32} --out $out/ablations; done ;;
    *) echo "unknown part: $part (alignment, features, pca, tables)" >&2; exit 2 ;;
  esac
done
florence-vl analyze report $out
