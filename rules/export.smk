rule export:
    input:
        model=rules.download.output.manifest,
        train=rules.train.output.manifest,
    output:
        manifest=LAYOUT.run / "export" / "manifest.json",
    log:
        LOGS / "export.log",
    benchmark:
        LOGS / "export.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("export.py"),
        digest=LAYOUT.stage_digest("export"),
        model=LAYOUT.model / "hf",
        checkpoints=LAYOUT.checkpoints,
        directory=LAYOUT.run / "export",
    message:
        "export: the trained Megatron checkpoint to a Hugging Face directory"
    shell:
        "HF_HUB_OFFLINE=1 {params.command}"
        " --model {params.model} --checkpoint {params.checkpoints} --train-manifest {input.train}"
        " --output {params.directory} --log {log}"
