rule download:
    input:
        model_files,
    output:
        manifest=LAYOUT.model / "manifest.json",
    params:
        digest=LAYOUT.stage_digest("download"),
        directory=LAYOUT.model,
    log:
        LOGS / "download.log",
    benchmark:
        LOGS / "download.benchmark.tsv"
    message:
        "download: bring the Hugging Face model ({CONFIG.model.source})"
    shell:
        "{PYTHON} {SCRIPTS}/download.py --config {RUN_CONFIG} --output {params.directory}"
        " --log {log}"
