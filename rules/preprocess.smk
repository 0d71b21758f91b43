rule preprocess:
    input:
        corpora_files,
        model=rules.download.output.manifest,
    output:
        manifest=LAYOUT.data / "manifest.json",
    log:
        LOGS / "preprocess.log",
    benchmark:
        LOGS / "preprocess.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("preprocess.py"),
        digest=LAYOUT.stage_digest("preprocess"),
        model=LAYOUT.model / "hf",
        directory=LAYOUT.data,
    message:
        "preprocess: tokenize the corpora into Megatron's .bin and .idx"
    shell:
        "HF_HUB_OFFLINE=1 {params.command}"
        " --model {params.model} --output {params.directory} --log {log}"
