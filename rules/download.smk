rule download:
    input:
        model_files,
    output:
        manifest=LAYOUT.model / "manifest.json",
    log:
        LOGS / "download.log",
    benchmark:
        LOGS / "download.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("download.py"),
        digest=LAYOUT.stage_digest("download"),
        directory=LAYOUT.model,
    message:
        "download: bring the Hugging Face model ({CONFIG.model.source})"
    shell:
        "{params.command} --output {params.directory}" " --log {log}"
