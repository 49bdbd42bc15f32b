"""`python -m srt_cli`, so that launchers such as torchrun can start a command."""

from srt_cli.cli import main

if __name__ == "__main__":
    main()
