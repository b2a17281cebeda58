import abc


class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        """Numbers become numbers, all else texts."""
        given = dict(each.split("=", 1) for each in arg_string.split(","))
        given = {name: int(value) if value.isnumeric() else value for name, value in given.items()}
        return cls(**given, **{name: value for name, value in (additional_config or {}).items() if value is not None})

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size
