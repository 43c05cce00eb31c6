#!/usr/bin/env bash
# From folders of images to deployed models: chain.sh IMAGES SCENES. IMAGES holds class folders under train and val,
# SCENES images and labels under train and val. Writes runs/ and exported/ where it is started. What makes it small
# stands in TINY, SHORT and HERE; the architecture is named once, where it is pre-trained.
set -euo pipefail
IMAGES=$1
SCENES=$2
TINY="--model.size tiny --model.width 64 --model.depth 4 --model.num-heads 2 --model.image-size 64"
SHORT="--batch-size 4 --batch-per-device 4 --data.threads 1 --log.progress none"
HERE="--device cpu"

beit-fast train train_tokenizer --data.path "$IMAGES/train" --steps 6 --hidden-dim 16 --quantizer.autoencoder-steps 2 \
    --output-dir runs/tokenizer $SHORT $HERE
beit-fast train pretrain_beit_base --data.path "$IMAGES/train" --tokenizer.name runs/tokenizer --steps 3 \
    --masking.num-masked 6 --masking.min-num-patches 2 --output-dir runs/pretrain $TINY $SHORT $HERE
beit-fast knn runs/pretrain "$IMAGES" $HERE
beit-fast embed runs/pretrain "$IMAGES/val" features.npy $HERE

beit-fast train finetune_imagenet_base --data.path "$IMAGES" --data.num-classes None --weights runs/pretrain \
    --epochs 1 --output-dir runs/finetune $SHORT $HERE
beit-fast evaluate runs/finetune --data.path "$IMAGES" $HERE
beit-fast predict runs/finetune "$IMAGES"/val/* --json $HERE > classes.jsonl
for target in timm transformers onnx torch-export safetensors; do
    beit-fast export runs/finetune "exported/$target" --to "$target"
done

beit-fast train segment_ade20k_base --data.path "$SCENES" --data.num-classes None --data.no-reduce-zero-label \
    --weights runs/pretrain --model.image-size 64 --crops.base 128 64 --model.channels 8 --model.auxiliary-channels 8 \
    --steps 2 --output-dir runs/segment $SHORT $HERE
beit-fast evaluate runs/segment --data.path "$SCENES" --ratios 1 1.5 --flip $HERE
beit-fast segment runs/segment "$SCENES"/val/images/* --output-dir segments $HERE
for target in onnx torch-export safetensors; do
    beit-fast export runs/segment "exported/segment-$target" --to "$target"
done
