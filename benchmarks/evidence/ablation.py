"""The paper's ablations at small scale: pre-training objective (table 4) and architecture (table 5).

    python -m benchmarks.evidence.ablation                                     # five rows, probes and fine-tuning
    python -m benchmarks.evidence.ablation --rows blockwise_tokens layer_scale plus     # or others, by name

Drawn scenes of 64 x 64 pixels, 24 classes, a BEiT of width 128 and depth 4; a functional check, not ImageNet: the paper
pre-trains a BEiT-B for 300 epochs on ImageNet-1k and fine-tunes it for 100; it probes its best models only. One
pre-training per row, three labelled sets of 6000 scenes. A stopped study continues where it was; the record grows by a
line per run. Hardware: about 70 minutes of one CPU core. Result: docs/evidence.md.
"""

from benchmarks.evidence.study import Row, Study, main

RANDOM = {"masking.mode": "random"}
PIXELS = {"objective.target": "pixels"}
ALL = {"objective.recover": "all"}

config = Study(
    choices=(
        ("blockwise_tokens", Row("BEiT", paper=82.86)),
        ("random_mask", Row("- blockwise masking", RANDOM, paper=82.77)),
        ("pixels", Row("- visual tokens (pixels)", PIXELS, paper=81.04)),
        ("pixels_random_mask", Row("- visual tokens - blockwise masking", PIXELS | RANDOM, paper=80.50)),
        ("recover_all", Row("+ recover 100 % visual tokens", ALL, paper=82.59)),
        ("no_mask", Row("- masking + recover 100 % visual tokens", ALL | {"masking.mode": "none"}, paper=81.67)),
        ("longer", Row("longer: 800 epochs, not 300", length=8 / 3, paper=83.19)),
        ("layer_scale", Row("+ LayerScale", {"model.layer_scale_init": 0.1}, paper=83.00)),
        ("plus", Row("+ LayerScale + relative position bias", {"model.preset": "plus"}, paper=83.22)),
        ("scratch", Row("from scratch (there DeiT-B, quoted in table 1)", length=0, paper=81.8)),
    ),
    rows=("blockwise_tokens", "random_mask", "pixels", "recover_all", "scratch"),
)

if __name__ == "__main__":
    main(config)
