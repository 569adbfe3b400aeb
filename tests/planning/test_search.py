"""The order in which ways to train are tried."""

import dataclasses

from jaxlm.core.sharding import MeshConfig
from jaxlm.models.presets import preset
from jaxlm.planning import CHIPS, candidates

MODEL, PARAMETERS = preset("llama-2-7b"), 6_738_415_616


def ways(kind, chips, batch_size):
    return candidates(MODEL, PARAMETERS, CHIPS[kind], chips, batch_size=batch_size, length=4096)


def test_all_divide_evenly():
    found = ways("v5e", 64, 128)
    assert found
    for way in found:
        mesh = way.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == 64
        assert 128 % (mesh.data * mesh.fsdp * way.micro_batches) == 0
        assert MODEL.num_heads % mesh.tensor == 0


def test_what_should_fit_comes_first_and_the_fastest_of_it():
    found = ways("v5e", 64, 128)
    fitting = [way.memory <= CHIPS["v5e"].memory for way in found]
    assert fitting == sorted(fitting, reverse=True)
    seconds = [way.seconds for way, fits in zip(found, fitting, strict=True) if fits]
    assert seconds == sorted(seconds)


def test_more_memory_allows_less_to_be_computed_again():
    def best(kind):
        return next(w for w in ways(kind, 256, 1024) if w.micro_batches == 1 and w.mesh.tensor == 1)

    assert best("v5e").remat == "full"
    assert best("v5p").remat == "dots"


def test_state_alone_can_be_too_much():
    # 81 GB of parameters and moments on 4 chips of 17 GB.
    assert all(way.memory > CHIPS["v5e"].memory for way in ways("v5e", 4, 4))


def test_the_options_are_those_of_the_command_line():
    way = dataclasses.replace(ways("v5e", 64, 128)[0], mesh=MeshConfig(data=1, fsdp=32, tensor=2), remat="full")
    assert str(way) == f"--mesh data=1,fsdp=32,tensor=2 --remat full --micro_batches {way.micro_batches}"
