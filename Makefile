# make demo       two small trainings and the table, on synthetic images, in a few minutes on two cores
# make test       ruff and the tests
# make reproduce  the full recipe on CIFAR-10, from where it stopped
# make reproduce-slice MINUTES=9  as much of it as fits, with all that the next slice needs copied to carry/
PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 9
CARRY  ?= carry
RUN    := $(VENV)/bin/python

.PHONY: demo test reproduce reproduce-slice clean
.DELETE_ON_ERROR:

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

# torchattacks pins an ancient `requests` that it needs for nothing here
$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-extras.txt
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	$(VENV)/bin/pip install --quiet --no-deps "torchattacks>=3.5"
	touch $@

SYNTHETIC := --dataset synthetic --depth 8 --overwrite
PUSH      := --prototype-init class-means --weight-conprox 1e-3 --lr-conprox 1e-3
demo: $(VENV)/installed
	$(RUN) softmax_training.py $(SYNTHETIC) --epochs 5 --milestones 4 --warmup 0 --save-to demo/softmax.pth.tar
	$(RUN) pcl_training.py $(SYNTHETIC) --epochs 8 $(PUSH) --init-from demo/softmax.pth.tar --save-to demo/pcl.pth.tar
	$(RUN) robustness.py --dataset synthetic --limit 500 --overwrite --epsilon 2/255 --step-size 0.5/255 \
		--checkpoints demo/softmax.pth.tar demo/pcl.pth.tar --results demo/robustness.json

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

reproduce: $(VENV)/installed
	PYTHON=$(RUN) ./reproduce.sh

reproduce-slice: $(VENV)/installed
	PYTHON=$(RUN) ./reproduce.sh $(MINUTES) $(CARRY)

clean:
	rm -rf $(VENV) demo
