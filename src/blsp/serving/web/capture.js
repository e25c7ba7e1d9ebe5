// The AudioWorklet: hands the microphone's first channel to the page, in blocks of about 20 ms.
class Capture extends AudioWorkletProcessor {
  block = new Float32Array(1024); // process() is given 128 samples: larger blocks mean fewer messages
  filled = 0;

  process(inputs) {
    const channel = inputs[0][0];
    if (!channel) return true;
    this.block.set(channel, this.filled);
    this.filled += channel.length;
    if (this.filled + channel.length > this.block.length) {
      this.port.postMessage(this.block.slice(0, this.filled));
      this.filled = 0;
    }
    return true;
  }
}
registerProcessor("capture", Capture);
