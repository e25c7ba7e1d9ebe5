// Microphone -> 16 kHz mono samples, with a level while it records; samples -> WAV.

export const RATE = 16000;

export class Recorder {
  // onLevel(rms, seconds) is called for every block.
  constructor(onLevel) {
    this.onLevel = onLevel;
    this.blocks = [];
    this.ready = false;
  }

  async start() {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("This browser gives pages no microphone here. Open the page over https or from localhost, or choose a file.");
    }
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: false, autoGainControl: true },
    });
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("capture.js");
    this.blocks = [];
    const source = this.context.createMediaStreamSource(this.stream);
    const capture = new AudioWorkletNode(this.context, "capture");
    capture.port.onmessage = ({ data }) => {
      this.blocks.push(data);
      this.onLevel(Math.sqrt(data.reduce((sum, x) => sum + x * x, 0) / data.length), data.length / this.context.sampleRate);
    };
    const silent = new GainNode(this.context, { gain: 0 });
    source.connect(capture).connect(silent).connect(this.context.destination);
    this.ready = true;
  }

  // Forgets all but the last `seconds`.
  keep(seconds) {
    let left = seconds * this.context.sampleRate, first = this.blocks.length;
    while (first && left > 0) left -= this.blocks[--first].length;
    this.blocks.splice(0, first);
  }

  // What was recorded since the last call; the recording goes on.
  async take() {
    const blocks = this.blocks;
    this.blocks = [];
    const samples = new Float32Array(blocks.reduce((sum, block) => sum + block.length, 0));
    let at = 0;
    for (const block of blocks) {
      samples.set(block, at);
      at += block.length;
    }
    return samples.length ? resample(samples, this.context.sampleRate) : samples;
  }

  async stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    await this.context?.close();
    return this.take();
  }
}

// By the browser's own resampler, which filters out what would alias.
async function resample(samples, rate) {
  if (rate === RATE) return samples;
  const offline = new OfflineAudioContext(1, Math.max(1, Math.round((samples.length * RATE) / rate)), RATE);
  const buffer = offline.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = new AudioBufferSourceNode(offline, { buffer });
  source.connect(offline.destination);
  source.start();
  return (await offline.startRendering()).getChannelData(0);
}

// A file as decoded by the browser, 16 kHz mono (the mean of the channels); null if it cannot be decoded.
export async function decode(bytes) {
  try {
    const buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes.slice(0));
    const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
    return channels.length === 1 ? channels[0] : channels[0].map((_, i) => channels.reduce((sum, c) => sum + c[i], 0) / channels.length);
  } catch {
    return null;
  }
}

export function toWav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const write = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  write(8, "WAVEfmt ");
  [[16, 16, 4], [20, 1, 2], [22, 1, 2], [24, RATE, 4], [28, 2 * RATE, 4], [32, 2, 2], [34, 16, 2]].forEach(
    ([at, value, size]) => (size === 4 ? view.setUint32(at, value, true) : view.setUint16(at, value, true)));
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

export function drawWave(canvas, samples) {
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [(canvas.width = 176 * scale), (canvas.height = 36 * scale)];
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  const bars = 60, each = Math.max(1, Math.floor(samples.length / bars));
  const peaks = Array.from({ length: bars }, (_, i) => samples.subarray(i * each, (i + 1) * each).reduce((m, x) => Math.max(m, Math.abs(x)), 0));
  const loudest = Math.max(...peaks, 0.01);
  peaks.forEach((peak, i) => {
    const tall = Math.max(scale, (peak / loudest) * height * 0.95);
    pen.fillRect((i * width) / bars, (height - tall) / 2, (0.6 * width) / bars, tall);
  });
}
