rule preprocess:
    input:
        corpora_files,
        model=rules.download.output.manifest,
    output:
        manifest=LAYOUT.data / "manifest.json",
    params:
        digest=LAYOUT.stage_digest("preprocess"),
        model=LAYOUT.model / "hf",
        directory=LAYOUT.data,
    log:
        LOGS / "preprocess.log",
    benchmark:
        LOGS / "preprocess.benchmark.tsv"
    message:
        "preprocess: tokenize the corpora into Megatron's .bin and .idx"
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON} {SCRIPTS}/preprocess.py --config {RUN_CONFIG}"
        " --model {params.model} --output {params.directory} --log {log}"
