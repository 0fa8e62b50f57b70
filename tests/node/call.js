// Calls a method of a gRPC server that is known by its address only: what it offers comes from server reflection.
//
//   node call.js ADDRESS                       prints the services, as one line of JSON
//   node call.js ADDRESS SERVICE/METHOD JSON   sends the request, prints every answer as a line of JSON
//
// An error is one line {"error": {code, message, reason, domain}}, with the google.rpc.ErrorInfo that came with it, and
// exit status 1. The only contract that is read from a file is reflection's own, from its package.

import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const OPTIONS = { longs: String, enums: String, bytes: String };
const DEADLINE_MS = 20_000;

const [address, method, request = '{}'] = process.argv.slice(2);
const connect = (Service) => new Service(address, grpc.credentials.createInsecure());
const deadline = () => ({ deadline: Date.now() + DEADLINE_MS });

class Reflection {
  constructor() {
    // Within the package, whose main file is build/src/index.js.
    const main = createRequire(import.meta.url).resolve('@grpc/reflection');
    const file = join(dirname(main), '..', 'proto', 'grpc', 'reflection', 'v1alpha', 'reflection.proto');
    const { grpc: root } = grpc.loadPackageDefinition(protoLoader.loadSync(file));
    this.client = connect(root.reflection.v1alpha.ServerReflection);
  }

  ask(question) {
    return new Promise((resolve, reject) => {
      const call = this.client.ServerReflectionInfo(deadline());
      call.on('data', resolve);
      call.on('error', reject);
      call.on('end', () => reject(new Error(`reflection does not answer ${JSON.stringify(question)}`)));
      call.end(question);
    });
  }

  async services() {
    const { listServicesResponse } = await this.ask({ listServices: '' });
    return listServicesResponse.service.map((service) => service.name);
  }

  // What the file that declares the symbol, and every file that it imports, define: by their full names.
  async definitions(symbol) {
    const { fileDescriptorResponse, errorResponse } = await this.ask({ fileContainingSymbol: symbol });
    if (errorResponse) throw new Error(`the server knows no ${symbol}: ${errorResponse.errorMessage}`);
    // A FileDescriptorSet is the files, each as field 1 with its length before it.
    const set = fileDescriptorResponse.fileDescriptorProto.flatMap((file) => [field1(file.length), file]);
    return protoLoader.loadFileDescriptorSetFromBuffer(Buffer.concat(set), OPTIONS);
  }
}

function field1(length) {
  const bytes = [0x0a];
  for (; length > 0x7f; length >>>= 7) bytes.push((length & 0x7f) | 0x80);
  return Buffer.from([...bytes, length]);
}

async function printAnswers(reflection) {
  const [serviceName, methodName] = method.split('/');
  const definitions = await reflection.definitions(serviceName);
  const { responseStream } = definitions[serviceName][methodName];
  const client = connect(grpc.makeClientConstructor(definitions[serviceName], serviceName));
  const print = (answer) => console.log(JSON.stringify(answer));
  await new Promise((resolve, reject) => {
    if (responseStream) {
      const call = client[methodName](JSON.parse(request), deadline());
      call.on('data', print);
      call.on('error', reject);
      call.on('end', resolve);
    } else {
      client[methodName](JSON.parse(request), deadline(), (error, answer) => (error ? reject(error) : resolve(print(answer))));
    }
  });
}

async function describe(reflection, error) {
  const described = { code: grpc.status[error.code], message: error.details };
  const [details] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!details) return described;
  const decode = async (type, bytes) => (await reflection.definitions(type))[type].deserialize(bytes);
  for (const any of (await decode('google.rpc.Status', details)).details) {
    if (any.type_url.endsWith('/google.rpc.ErrorInfo')) {
      const { reason, domain } = await decode('google.rpc.ErrorInfo', Buffer.from(any.value, 'base64'));
      Object.assign(described, { reason, domain });
    }
  }
  return described;
}

const reflection = new Reflection();
try {
  if (method) await printAnswers(reflection);
  else console.log(JSON.stringify(await reflection.services()));
} catch (error) {
  if (!(error.code in grpc.status)) throw error;
  console.log(JSON.stringify({ error: await describe(reflection, error) }));
  process.exitCode = 1;
}
reflection.client.close();
