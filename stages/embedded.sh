#!/usr/bin/env bash
# Train the embedded checkpoint: all four stages of preset tiny on the synthetic recipe. About eleven hours of CPU time, and 51 minutes of
# one GPU with 16 cores.
# Usage: stages/embedded.sh LABEL_MAP_FOLDER RUN_FOLDER
set -euo pipefail
data=$1 runs=$2
common=(--data "$data" --set recipe=synthetic --set seed=1 --set workers=1 --set save_every=100 --set validate_every=200)
stage() { echo "== $1 $(date +%T)"; python -m stages "$@" "${common[@]}"; }
stage vision --preset tiny --out "$runs/vision" --set steps=260 --set num_slices=4
stage align --init "$runs/vision" --out "$runs/align" --set steps=140 --set batch_size=12 --set num_slices=4
# Few slices of many heads: a dense decoder learns by steps, and slices of one head say much the same.
few=(--set num_slices=4 --set max_slices=4)
stage pretrain --init "$runs/align" --out "$runs/pretrain" --set steps=6000 --set mask_share=0.65 --set word_share=0.1 "${few[@]}"
# Words alone, in larger batches: what masks show, said in words on the card, is learnt from many studies at once.
still=(--set 'learning_rate.vision.*=0' --set 'learning_rate.heads.*=0' --set 'learning_rate.projector.*=0' --set 'learning_rate.language.*=0.001')
stage pretrain --init "$runs/pretrain" --out "$runs/words" --set steps=700 --set batch_size=4 --set mask_share=0 --set word_share=0.999 \
    --set image_share=0 "${still[@]}" "${few[@]}"
# Then the queries are brought back to the masks.
stage instruct --init "$runs/words" --out "$runs/instruct" --set steps=250 --set batch_size=4 --set mask_share=0 --set word_share=0.55 "${few[@]}"
python -m stages.release "$runs/instruct" --data "$data" --out "$runs/calibrated" --count 120
# Reconstruction alone, on large matrices: nothing else moves, so that masks, words and thresholds stay what they are.
alone=(--set mask_share=0 --set word_share=0 --set image_share=0.9999 --set 'learning_rate.vision.*=0' --set 'learning_rate.projector.*=0'
    --set 'learning_rate.language.*=0' --set 'learning_rate.heads.reconstruct.*=0.001' --set 'learning_rate.heads.*=0')
stage pretrain --init "$runs/calibrated" --out "$runs/reconstruct" --set steps=11000 --set batch_size=2 --set kspace_size=160 --set num_slices=2 \
    --set max_slices=2 "${alone[@]}"
# Everything else anew and at scale: a wider pixel decoder, a deeper language model with more words, every stage 3 term but
# reconstruction. The processors make 200 studies a second, the accelerator sees each batch in three steps.
scale=(--set recipe=synthetic --set workers=15 --set batch_size=64 --set echo=3 --set num_slices=4 --set max_slices=4 --set kspace_size=0 --set image_share=0
    --set 'learning_rate.heads.reconstruct.*=0' --set save_every=300 --set validate_every=1285 --set validate_batches=2)
python -m stages pretrain --init "$runs/reconstruct" --out "$runs/large" --data "$data" --set seed=11 --set steps=6426 --set warmup=200 --set mask_share=0.5 \
    --set word_share=0.3 --set stem_widths=32,64,128,256,320 --set text_layers=6 --set vocab_size=1600 "${scale[@]}"
python -m stages instruct --init "$runs/large" --out "$runs/instruct2" --data "$data" --set seed=12 --set steps=1449 --set mask_share=0.1 --set word_share=0.6 \
    "${scale[@]}"
# How people ask: words alone, of which eight rows in a row are about one study. Three times: the second time with ten times as many wordings and
# questions on lobes asked at once, an hour of a core and a half each; the third time with what is asked rarely as often as the rest, for 75 minutes of
# two cores (its schedule was of 2,200 steps until step 1,000).
spoken=(--data "$data" --set recipe=synthetic --set seed=21 --set workers=1 --set attention=sdpa --set warmup=20 --set batch_size=24 --set tellings=8
    --set num_slices=4 --set max_slices=4 --set kspace_size=0 --set mask_share=0 --set word_share=0.999 --set image_share=0 --set 'learning_rate.vision.*=0'
    --set 'learning_rate.projector.*=0' --set 'learning_rate.language.*=0.0006' --set 'learning_rate.heads.segment.query.*=0.0006'
    --set 'learning_rate.heads.*=0')
python -m stages pretrain --init "$runs/instruct2" --out "$runs/words2" --set steps=950 "${spoken[@]}"
python -m stages pretrain --init "$runs/words2" --out "$runs/words3" --set steps=900 "${spoken[@]}"
python -m stages pretrain --init "$runs/words3" --out "$runs/words4" --set steps=1750 "${spoken[@]}" --set seed=31 --set warmup=40 --set compile=true \
    --set 'learning_rate.language.*=0.0008'
# Everything once more at scale, with four more blocks in the pixel decoder, small lesions that weigh as much as large ones, and
# thick slices as other planes see them: 2,400 steps of a schedule of 6,000 (echo=4 until step 400; there the machine was lost), 2,500 from
# the weights that were left; and words alone. Fifteen processors made about 100 studies a second.
more=("${scale[@]}" --set across_share=0.25)
lower=(--set 'learning_rate.vision.backbone.embeddings.mask_token=0' --set 'learning_rate.heads.contrast.*=0' --set mask_share=0.6 --set word_share=0.2)
python -m stages pretrain --init "$runs/words4" --out "$runs/large2" --data "$data" "${more[@]}" "${lower[@]}" --set seed=41 --set steps=6000 --set warmup=150 \
    --set extra_blocks=0,1,1,1,1 --set 'learning_rate.vision.*=0.0003' --set 'learning_rate.projector.*=0.0006' --set 'learning_rate.language.*=0.001' \
    --set 'learning_rate.heads.pixels.*=0.003' --set 'learning_rate.heads.segment.table=0.003' --set 'learning_rate.heads.segment.query.*=0.002'
python -m stages pretrain --init "$runs/large2" --out "$runs/large3" --data "$data" "${more[@]}" "${lower[@]}" --set seed=43 --set steps=2500 --set warmup=80 \
    --set 'learning_rate.vision.*=0.0002' --set 'learning_rate.projector.*=0.0004' --set 'learning_rate.language.*=0.0008' \
    --set 'learning_rate.heads.pixels.*=0.002' --set 'learning_rate.heads.segment.table=0.002' --set 'learning_rate.heads.segment.query.*=0.0014'
python -m stages pretrain --init "$runs/large3" --out "$runs/words5" --data "$data" "${more[@]}" --set echo=1 --set tellings=8 --set seed=42 --set steps=800 \
    --set warmup=40 --set mask_share=0 --set word_share=0.999 --set 'learning_rate.vision.*=0' --set 'learning_rate.projector.*=0' \
    --set 'learning_rate.language.*=0.0009' --set 'learning_rate.heads.segment.query.*=0.0009' --set 'learning_rate.heads.*=0'
# Masks once more, on two cores in half an hour: until here the white-matter rims of the label maps were lesions in every study with a disease.
# Features alone move; the queries that meet them stand. (200 steps of a schedule of 3,000, then this one.)
python -m stages pretrain --init "$runs/words5" --out "$runs/masks6" --data "$data" --set recipe=synthetic --set seed=51 --set workers=1 --set compile=true \
    --set reuse=3 --set batch_size=4 --set num_slices=4 --set max_slices=4 --set kspace_size=0 --set across_share=0.25 --set mask_share=0.9999 \
    --set word_share=0 --set image_share=0 --set steps=2200 --set warmup=60 --set 'learning_rate.vision.*=0' --set 'learning_rate.projector.*=0' \
    --set 'learning_rate.language.*=0' --set 'learning_rate.heads.pixels.*=0.0008' --set 'learning_rate.heads.sequence.*=0.001' \
    --set 'learning_rate.heads.*=0'
python -m stages.release "$runs/masks6" --data "$data" --out "$runs/released6" --count 200
# The same for another hour on two cores. Alone it is no better than what it began with; the mean of both is. (A schedule of 2,600 steps until step
# 400, of 2,100 until step 1,200, then this one.)
python -m stages pretrain --init "$runs/released6" --out "$runs/masks7" --data "$data" --set recipe=synthetic --set seed=61 --set workers=1 --set compile=true \
    --set reuse=2 --set batch_size=4 --set num_slices=4 --set max_slices=4 --set kspace_size=0 --set across_share=0.25 --set mask_share=0.9999 \
    --set word_share=0 --set image_share=0 --set steps=1750 --set warmup=100 --set 'learning_rate.vision.*=0' --set 'learning_rate.projector.*=0' \
    --set 'learning_rate.language.*=0' --set 'learning_rate.heads.pixels.*=0.0007' --set 'learning_rate.heads.sequence.*=0.001' \
    --set 'learning_rate.heads.*=0'
python -m stages.release "$runs/masks7" --mean-with "$runs/released6" --data "$data" --out omnimri/embedded --count 200
# The rule of lesions and the thresholds of sequences again, on more heads, with bright fluid left out of what may be a lesion. Of what it wrote,
# the scope of the weights before was kept: it differs by 2 to 7 %, and would be another 36 MB.
python -m stages.release omnimri/embedded --data "$data" --out "$runs/rule" --count 300 --heads 150
# The head of sequences, fitted to what the model makes of studies, spoilt, and its thresholds; nothing else moves.
python -m stages.release omnimri/embedded --data "$data" --out "$runs/sequence" --keep-calibration --profiles 3400
