# Read by the shell that torchx starts torchrun with (BASH_ENV in .torchxconfig): finds .venv when it is not active.
unset BASH_ENV
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/torchrun ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
