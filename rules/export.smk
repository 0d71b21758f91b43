rule export:
    input:
        model=rules.download.output.manifest,
        train=rules.train.output.manifest,
    output:
        manifest=LAYOUT.run / "export" / "manifest.json",
    params:
        digest=LAYOUT.stage_digest("export"),
        model=LAYOUT.model / "hf",
        checkpoints=LAYOUT.checkpoints,
        directory=LAYOUT.run / "export",
    log:
        LOGS / "export.log",
    benchmark:
        LOGS / "export.benchmark.tsv"
    message:
        "export: the trained Megatron checkpoint to a Hugging Face directory"
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON} {SCRIPTS}/export.py --config {RUN_CONFIG}"
        " --model {params.model} --checkpoint {params.checkpoints} --train-manifest {input.train}"
        " --output {params.directory} --log {log}"
