rule export:
    input:
        model=place("model", "manifest.json"),
        train=rules.train.output.manifest,
    output:
        manifest=RUNS.place("run") / "export" / "manifest.json",
    log:
        RUNS.log("export"),
    benchmark:
        RUNS.log("export", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("export.py"),
        digest=digest_of("export"),
        model=place("model", "hf"),
        checkpoints=place("checkpoints"),
        directory=place("run", "export"),
    message:
        "export: the trained Megatron checkpoint to a Hugging Face directory"
    shell:
        "HF_HUB_OFFLINE=1 {params.command}"
        " --model {params.model} --checkpoint {params.checkpoints} --train-manifest {input.train}"
        " --output {params.directory} --log {log}"
